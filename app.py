"""A page in the browser: choose classes, steps, solver, guidance, AMM or mediators, and watch two settings side by side.

    python app.py --ckpt CKPT
    python app.py --ckpts CKPT4 CKPT16 CKPT64          # several: compare them, or let them take turns

It listens on this machine alone (--host), shares nothing, and limits what one visitor may ask for (--max-images, --max-steps,
--max-seconds).
"""

from collections.abc import Sequence

from page.library import Library
from page.settings import LOCAL_HOSTS, parse
from runtime import cli
from runtime.distributed import note, start


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    state = start()
    if state.num_processes > 1:
        raise ValueError("app.py runs as one process")
    if args.host not in LOCAL_HOSTS:
        note(f"--host {args.host}: whoever reaches this machine can use the page; it asks for no password")
    from page.layout import build, launch  # Gradio takes seconds to import: flags are checked first

    launch(build(Library(args, state.device)), args)


if __name__ == "__main__":
    cli.run(main)
