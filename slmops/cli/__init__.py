"""slmops on the command line."""
