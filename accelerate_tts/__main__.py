"""`python -m accelerate_tts`: the command line, for environments whose scripts are not on PATH."""

from accelerate_tts.cli import main

if __name__ == "__main__":
    main()
