"""Requests to language models, on a server or in this process, with a persistent store of answers."""

from pyqemb.llm.ask import Asker as Asker
from pyqemb.llm.ask import run_in_order as run_in_order
from pyqemb.llm.request import Answer as Answer
from pyqemb.llm.request import Endpoint as Endpoint
from pyqemb.llm.request import MalformedAnswerError as MalformedAnswerError
from pyqemb.llm.request import Request as Request
from pyqemb.llm.request import parse as parse
from pyqemb.llm.store import Store as Store
