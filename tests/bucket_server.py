"""An object store on loopback for tests: python tests/bucket_server.py PORT_FILE

gcp-storage-emulator, with what it lacks and locks and TensorStore need: writes and deletions under the
condition of a generation (ifGenerationMatch), the generation of what is read.
"""

import contextlib
import sys
import threading
from http import HTTPStatus
from pathlib import Path

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

one_at_a_time = threading.Lock()


def conditional(handler, name_of):
    def handle(request, response, storage, *args, **kwargs):
        wanted = request.query.get("ifGenerationMatch")
        if not wanted:
            return handler(request, response, storage, *args, **kwargs)
        with one_at_a_time:
            try:
                there = storage.get_file_obj(request.params["bucket_name"], name_of(request))
                generation = there["generation"]
            except NotFound:
                generation = "0"
            if generation != wanted[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
            return handler(request, response, storage, *args, **kwargs)

    return handle


def uploaded_name(request):
    return (request.query.get("name") or [None])[0] or request.data["meta"]["name"]


def telling_generation(handler):
    def handle(request, response, storage, *args, **kwargs):
        with contextlib.suppress(NotFound):
            there = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = there["generation"]
        return handler(request, response, storage, *args, **kwargs)

    return handle


objects.insert = conditional(objects.insert, uploaded_name)
objects.delete = conditional(objects.delete, lambda request: request.params["object_id"])


def forbidding(handler):
    """All of the bucket "forbidden"."""

    def handle(request, response, storage, *args, **kwargs):
        if request.params["bucket_name"] == "forbidden":
            response.status = HTTPStatus.FORBIDDEN
            return None
        return handler(request, response, storage, *args, **kwargs)

    return handle


objects.ls = forbidding(objects.ls)
objects.get = telling_generation(objects.get)
objects.download = telling_generation(objects.download)

from gcp_storage_emulator import server  # noqa: E402 its table holds those above

if __name__ == "__main__":
    server.server.HTTPServer.request_queue_size = 128
    bucket = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    bucket.start()
    file = Path(sys.argv[1])
    file.with_suffix(".tmp").write_text(str(bucket._api._httpd.server_address[1]))
    file.with_suffix(".tmp").replace(file)
    threading.Event().wait()
