"""Encoding of text files to files of vectors."""

from pyqemb.encoding.dry_run import plan_encode as plan_encode
from pyqemb.encoding.job import encode_file as encode_file
