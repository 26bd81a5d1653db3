"""From a file of records to the batches of a step."""
