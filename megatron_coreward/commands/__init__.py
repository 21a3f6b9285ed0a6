"""The commands, one a file: `add(commands)` declares the arguments and names the function that runs them.

What a command needs is imported when it runs, so that `--help` and bad input are answered at once.
"""
