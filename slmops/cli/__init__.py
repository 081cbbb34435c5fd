"""What does a user type, and what comes back? `main` is the `slmops` command.

Start-up stays fast: `slmops --help` reads one table (`slmops.cli.commands`); a command's module is imported when the
command is named, its settings model when its options are, and the verb itself when it runs.
"""

from slmops.cli.entry import main

__all__ = ["main"]
