"""What training is made of, one small run at a time; their configs are in `configs/lessons/`."""
