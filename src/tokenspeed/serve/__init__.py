"""The server: Starlette on hypercorn, speaking OpenAI's protocol.

Rule: everything is bounded and checked at the door; nothing slow runs on the event loop; a bad
request fails alone; whoever leaves takes their work along.
"""

from tokenspeed.serve.app import create_app as create_app
from tokenspeed.serve.server import check as check
from tokenspeed.serve.server import run as run
from tokenspeed.serve.server import serving as serving
