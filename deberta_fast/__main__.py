import sys

from ._interrupt import as_usual
from .cli import main

if __name__ == "__main__":
    as_usual()
    sys.exit(main())
