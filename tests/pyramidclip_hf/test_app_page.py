"""The server behind the page of `pyramidclip app`: what it lets in and out (`make test-app`, which has Gradio)."""

import json
import socket
import sys
import urllib.error
import urllib.request
import uuid
from types import SimpleNamespace

import pytest

import pyramidclip_command
from pyramidclip_hf import app_page
from pyramidclip_hf.app_page import MAX_UPLOAD_BYTES, Page
from tests.pyramidclip_hf.page import files_below, make_folder, running_page

NEEDS_GRADIO = 'needs Gradio, which `make test-app` has: pip install "pyramidclip-hf[app]"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    home = tmp_path_factory.mktemp("home")
    with running_page(folder, "--labels-file", folder / "labels.txt", home=home) as (process, address, errors):
        yield address, home, errors
        assert process.poll() is None


def asked(address, path, data=None, headers=None):
    """(status, headers, body) of an answer."""
    request = urllib.request.Request(address + path, data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def uploaded(address, name, content):
    """Where the server keeps an uploaded file; None: refused."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    status, _, answer = asked(address, "/gradio_api/upload", body, headers)
    return json.loads(answer)[0] if status == 200 else None


def classified(address, path, labels="a cat\na dog"):
    """What the page's button gives for a file on the server: the last event."""
    config = json.loads(asked(address, "/config")[2])
    button = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "classify")
    number = next(one["id"] for one in config["dependencies"] if [button, "click"] in one["targets"])
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, labels, False]
    session = uuid.uuid4().hex
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode()
    status, _, _ = asked(address, "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    assert status == 200
    events = asked(address, f"/gradio_api/queue/data?session_hash={session}")[2].decode()
    messages = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
    return next(one for one in messages if one["msg"] == "process_completed")


def test_without_gradio_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert pyramidclip_command.main(["app", "--model", str(folder / "one")]) == 2
    assert capsys.readouterr().err == 'error: the page needs Gradio: pip install "pyramidclip-hf[app]"\n'


def test_an_uploaded_picture_is_classified_and_a_file_of_the_server_is_not_read(page, folder):
    address, _, _ = page
    picture = folder / "pictures" / "red.png"
    kept = uploaded(address, "red.png", picture.read_bytes())
    answer = classified(address, kept)
    bars, message = answer["output"]["data"]
    assert answer["success"] and {one["label"] for one in bars["confidences"]} == {"a cat", "a dog"} and message == ""
    refused = classified(address, str(picture))
    assert not refused["success"] and "confidences" not in json.dumps(refused)
    assert asked(address, f"/gradio_api/file={picture}")[0] in (403, 404)
    assert asked(address, "/gradio_api/file=/etc/hostname")[0] in (403, 404)
    assert "Traceback" not in json.dumps(refused)


def test_what_nobody_expected_is_told_to_the_server_alone(capsys):
    def answer(given, progress):
        raise RuntimeError(f"the inside, with {given}")

    page = SimpleNamespace(gradio=SimpleNamespace(Progress=lambda: None))
    shown = Page._answering(page, answer, 2)("a picture")
    assert shown[:2] == (None, None) and "Something went wrong" in shown[2] and "inside" not in shown[2]
    assert "RuntimeError: the inside, with a picture" in capsys.readouterr().err


def test_bad_input_is_a_sentence_with_its_marks_escaped(page):
    address, _, _ = page
    kept = uploaded(address, "words.png", b"no picture")
    answer = classified(address, kept)
    assert answer["output"]["data"][1] == (
        '<p role="alert">This is no picture, or of a kind that is not read here. What is read: JPEG, PNG, WEBP, GIF, '
        "BMP, TIFF, PPM, AVIF.</p>"
    )
    answer = classified(address, kept, labels="<script>\n<script>")
    assert "&lt;script&gt;” stands on lines 1 and 2" in answer["output"]["data"][1]


def test_the_browser_is_told_to_stay_here_and_other_names_are_refused(page):
    address, _, _ = page
    status, headers, body = asked(address, "/")
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert b"fonts.googleapis" not in body
    assert asked(address, "/", headers={"Host": "evil.example"})[0] == 400


def test_it_is_served_to_this_machine_alone(page):
    """Not at 127.0.0.2, which stands for the machine's other addresses: who serves all is reached there."""
    port = int(page[0].rpartition(":")[2])
    with socket.create_server(("0.0.0.0", 0)) as all_addresses:
        try:
            socket.create_connection(("127.0.0.2", all_addresses.getsockname()[1]), timeout=10).close()
        except OSError:
            pytest.skip("this system has no 127.0.0.2")
    socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=10)


@pytest.mark.parametrize("words", [[], ["--share"]])
def test_nothing_is_shared_unless_asked(words, folder, monkeypatch, capsys):
    """What Gradio is told; where it then gives no public address, that is said."""
    gradio = pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    told = {}

    def launch(blocks, **given):
        told.update(given)
        return None, "http://127.0.0.1:7860/", None

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr(app_page, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=stopped)))
    monkeypatch.setenv("GRADIO_SHARE", "True")
    code = pyramidclip_command.main(["app", "--model", str(folder / "one"), *words])
    assert (told["share"], told["server_name"]) == (bool(words), "127.0.0.1")
    out, err = capsys.readouterr()
    if words:
        assert code == 2 and out == "" and "error: --share: Gradio's servers gave no public address" in err
    else:
        assert code == 130 and out == "http://127.0.0.1:7860/\n"


def test_large_uploads_are_refused(page):
    address, home, _ = page
    assert uploaded(address, "small.jpg", bytes(1000)) is not None
    assert uploaded(address, "large.jpg", bytes(MAX_UPLOAD_BYTES + 1)) is None
    assert not any(path.stat().st_size > MAX_UPLOAD_BYTES for path in home.rglob("*.jpg"))


def test_nothing_is_written_outside_a_temporary_folder_which_goes_at_the_end(folder, tmp_path):
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    before = files_below(folder)
    with running_page(folder, "--examples", folder / "pictures", home=tmp_path) as (process, address, _):
        kept = uploaded(address, "red.png", (folder / "pictures" / "red.png").read_bytes())
        assert classified(address, kept)["success"]
        assert all(name.startswith("tmp/pyramidclip-app-") for name in files_below(tmp_path)), files_below(tmp_path)
        assert kept.startswith(str(tmp_path / "tmp" / "pyramidclip-app-"))
    assert process.returncode == 130
    assert files_below(folder) == before
    # Importing Transformers makes torch leave an empty folder in any temporary folder.
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {name for name in left if "torchinductor" not in name} == {"tmp", "here"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--embeddings", "two.npz"], "two.npz was made by another model"),
        (["--embeddings", "labels.txt"], "labels.txt"),
        (["--examples", "gone"], "--examples gone: there is no such file or folder"),
        (["--examples", "broken.png"], "This is no picture"),
        (["--labels-file", "empty.txt"], "There are no labels yet"),
        (["--compare", "gone/folder/x"], "--compare gone/folder/x: there is no such file or folder"),
        (["--port", "0"], "expected a number from 1 to 65535, got 0"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_code_2(words, sentence, folder, monkeypatch, capsys):
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    monkeypatch.chdir(folder)
    (folder / "broken.png").write_text("no picture")
    (folder / "empty.txt").write_text("")
    assert pyramidclip_command.main(["app", "--model", "one", *words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert sentence in line


def test_a_port_that_is_taken_is_said(page, folder, capsys):
    port = page[0].rpartition(":")[2]
    assert pyramidclip_command.main(["app", "--model", str(folder / "one"), "--port", port]) == 2
    assert f"--port {port}: the page cannot be served there" in capsys.readouterr().err


def test_without_a_model_the_demo_is_looked_for(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    monkeypatch.chdir(tmp_path)
    assert pyramidclip_command.main(["app"]) == 2
    assert "Without it the page shows what `make demo` leaves in runs/demo, which is not there" in (
        capsys.readouterr().err
    )
