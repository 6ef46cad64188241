"""Text in and out: tokenizer, chat template, incremental detokenizer, drafts.

Rule: ids on one side, whole characters on the other; text from outside never becomes a special
token unless the caller says so.
"""

from tokenspeed.text.chat import ChatEncoder as ChatEncoder
from tokenspeed.text.chat import ChatTemplate as ChatTemplate
from tokenspeed.text.detokenizer import Detokenizer as Detokenizer
from tokenspeed.text.detokenizer import Piece as Piece
from tokenspeed.text.tokenizer import Tokenizer as Tokenizer
