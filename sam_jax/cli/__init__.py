"""The commands: flags, and what they print."""
