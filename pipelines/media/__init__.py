"""One reader for pictures, one for sounds, one for videos: what a file gives is the same in every pipeline.

To be imported by module: `pictures`, `sounds`, `videos`, and `reading`, what they share. Builds on files and errors.
"""
