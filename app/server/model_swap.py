"""How a worker replaces its model in place. Imported with the first reload."""
import threading

from app.config import StartError
from app.server import counters


def start(worker, published):
    """Load the models of board.published() in a native thread. On failure the current ones stay."""
    def replace():
        try:
            worker.wsgi.extensions["replace"](published["models"])
        except Exception as e:  # whatever it was, the old model keeps serving
            worker.log.error("this worker keeps the old model: %s", e, exc_info=not isinstance(e, StartError))
            counters.own.failed(published["generation"])
        else:
            counters.own.serves(published["generation"])
    worker.replacing = threading.Thread(target=replace, name="replace-model", daemon=True)
    worker.replacing.start()
    worker.generation = published["generation"]
