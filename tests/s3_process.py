"""
The process of the S3 server of the tests: moto, whose conditional puts are made atomic.

moto looks whether a name is taken and stores the object in two steps, so two of its threads can both find it
free. S3 promises that one of two such requests fails ("Conditional writes" in the Amazon S3 user guide).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def one_conditional_put_at_a_time(application: WSGIApplication) -> WSGIApplication:
    """The application, which answers one request with `If-None-Match` at a time."""
    lock = threading.Lock()

    def answer(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environment:
            return application(environment, start_response)
        with lock:
            return application(environment, start_response)

    return answer


if __name__ == "__main__":
    run_simple(
        "127.0.0.1",
        0,
        one_conditional_put_at_a_time(DomainDispatcherApplication(create_backend_app)),
        threaded=True,
        request_handler=MotoRequestHandler,
    )
