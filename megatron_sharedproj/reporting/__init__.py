"""Reports and plots of finished or running trainings, from the files that a run leaves."""
