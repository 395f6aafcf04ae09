"""What only a GPU can show: checks, each in a process of its own, and a report in Markdown and JSON."""
