"""`python -m cupy_moe` is the command line, also where the package is not installed."""

from cupy_moe.tools.cli import main

if __name__ == "__main__":
    main(prog_name="cupy-moe")
