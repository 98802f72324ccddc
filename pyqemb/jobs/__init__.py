"""Jobs that are done in parts: the files of a part, the folder of a job, its tasks and its executors."""
