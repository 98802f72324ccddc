"""Encoding of text files to files of vectors."""

from pyqemb.encoding.job import encode_file as encode_file
