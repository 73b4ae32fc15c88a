"""What every script shares with the machine: command line, processes, files and random draws."""
