"""What the pages of all commands share: style, tables and pictures."""
