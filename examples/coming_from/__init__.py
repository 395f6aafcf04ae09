"""What the pages in docs/from/ train, with other trainers and with this one."""
