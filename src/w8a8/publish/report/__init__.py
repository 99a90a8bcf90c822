"""The HTML report, drawn from the files and the results."""
