"""Random changes of whole micro-batches of images, on the device that trains, drawn for each sample by its id."""
