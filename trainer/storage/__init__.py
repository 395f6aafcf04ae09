"""What is kept on disk, and what identifies it."""
