"""Looking into a run that has been: two runs compared, a step replayed on one process, a forward taken apart."""
