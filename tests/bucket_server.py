"""An object store on loopback for tests: python tests/bucket_server.py PORT_FILE

gcp-storage-emulator, with the one thing that it lacks and locks need: writes and deletions under the
condition of a generation (ifGenerationMatch).
"""

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


objects.insert = conditional(objects.insert, uploaded_name)
objects.delete = conditional(objects.delete, lambda request: request.params["object_id"])

from gcp_storage_emulator.server import create_server  # noqa: E402 its table holds the two above

if __name__ == "__main__":
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    port = server._api._httpd.server_address[1]
    file = Path(sys.argv[1])
    file.with_suffix(".tmp").write_text(str(port))
    file.with_suffix(".tmp").replace(file)
    threading.Event().wait()
