"Runs the command line: python -m cpsample, and the program cpsample."

import sys


def main() -> None:
    "The command line; interrupted while it is still being loaded, it says so in one line, too."
    try:
        from .cli import app

        app()
    except KeyboardInterrupt:
        print("cpsample: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
