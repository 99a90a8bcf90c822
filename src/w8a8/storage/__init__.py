"""Writing that is whole or not there: files in one pass, small files at once, folders and their locks."""
