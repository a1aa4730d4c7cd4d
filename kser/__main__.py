"""``python -m kser``: the command ``kser``."""

from kser.cli.main import main

if __name__ == "__main__":
    main()
