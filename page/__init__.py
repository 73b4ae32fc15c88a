"""The page of app.py: pictures of two settings side by side, in a browser."""
