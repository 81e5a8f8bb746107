"Runs the command line: python -m cpsample"
from .cli import app

app()
