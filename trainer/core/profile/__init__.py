"""`train.profile`: some steps under torch's profiler, where their time goes, and advice in words."""
