"""``python -m nbdsrv``."""

from nbdsrv.cli import main

if __name__ == "__main__":
    main()
