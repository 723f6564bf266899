"""Files of conversations, whatever their format: rows out of files, and each row as a record in LLaVA's format.

`sources` finds a data set's files; `texts`, `tables` and `tars` read a family of files each; `dialects` knows the
records that other tools write, and `embedded` the media that are inside of a file. Builds on files and errors.
"""
