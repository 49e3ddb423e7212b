"""docs/mobile.md, whose Kotlin and Swift nothing here compiles: what it says is compared with code and a manifest."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.messages import PROTOCOL_VERSION, AbandonRequest, ReportFacts, RetryWindow
from client_sdk.protocol.program import WITH_INNER_STEPS, Manifest, Role
from client_sdk.protocol.signing import device_id_of, sign_request
from client_sdk.runtime import read_manifest
from mobile_export import describe
from tests.bundles import meta_bundle

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/mobile.md").read_text()
VECTORS = {path.name for path in (ROOT / "tests/vectors").glob("*.json")}


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


KOTLIN, SWIFT = blocks("kotlin"), blocks("swift")
both = pytest.mark.parametrize("code", [KOTLIN, SWIFT], ids=["kotlin", "swift"])


@pytest.fixture(scope="module")
def manifest(cnn_bundle: Path) -> Manifest:
    return read_manifest(cnn_bundle)


def test_the_table_is_that_of_a_fresh_manifest(manifest: Manifest):
    assert describe.replaced(PAGE, describe.method_table(manifest)) == PAGE


def test_the_table_of_meta_learning_is_that_of_a_fresh_manifest(tmp_path: Path):
    section = PAGE.split("### Methods of meta-learning")[1].split("\n### ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*) \| (.*) \|$", section, re.MULTILINE)
    said = {
        role: (re.findall(r"`(\w+)`", inputs), re.findall(r"`(\w+)`", outputs))
        for roles, inputs, outputs in rows
        for role in re.findall(r"`(\w+)`", roles)
    }
    found = {
        m.role.value: ([t.name for t in m.inputs], [t.name for t in m.outputs])
        for m in meta_bundle(tmp_path / "bundle").manifest.methods
        if m.role in WITH_INNER_STEPS | {Role.PER_FEDAVG}
    }
    assert said == found


def test_the_table_is_made_by_a_command(
    cnn_bundle: Path, manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert describe.main([str(cnn_bundle)]) == 0
    assert capsys.readouterr().out == describe.method_table(manifest)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n{describe.BEGIN}\nold\n{describe.END}\nrest\n")
    assert describe.main([str(cnn_bundle), "--into", str(page)]) == 0
    assert page.read_text() == describe.replaced(page.read_text(), describe.method_table(manifest))
    assert page.read_text().endswith(f"{describe.END}\nrest\n")
    page.write_text("no markers")
    assert describe.main([str(cnn_bundle), "--into", str(page)]) == 2
    assert describe.main([str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_page_says_that_nothing_of_it_was_compiled():
    assert "**The Kotlin and Swift below is not compiled here" in PAGE


@pytest.mark.parametrize("language", ["kotlin", "swift"])
def test_blocks_close_what_they_open(language: str):
    """The little that can be seen of syntax without a compiler."""
    literal = r'#?"""(?:.|\n)*?"{3,4}#?|#"[^\n]*?"#|"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*(?:.|\n)*?\*/'
    pairs = {")": "(", "]": "[", "}": "{"}
    for block in re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        opened = []
        for bracket in re.findall(r"[()\[\]{}]", re.sub(literal, "", block)):
            if bracket in pairs:
                assert opened.pop() == pairs[bracket], block
            else:
                opened.append(bracket)
        assert opened == [], block


@both
def test_calls_pass_the_manifests_inputs_in_its_order(code: str, manifest: Manifest):
    calls = re.findall(r'execute\(\s*"(\w+)_b(?:\$batch|\\\(batch\))",\s*(.*?)\)?\n', code)
    assert {role for role, _ in calls} == {"train", "grad"}
    for role, arguments in calls:
        spec = manifest.method(Role(role), 8)
        assert spec.name == f"{role}_b8"
        passed = re.findall(r"EValue\.from\((\w+)\)", arguments) or re.findall(r"\w+", arguments.strip("[])"))
        assert passed == [tensor.name for tensor in spec.inputs]


@both
def test_tensors_have_the_manifests_types(code: str, manifest: Manifest):
    found = {
        name: {"Float": "float32", "Long": "int64", "Int64": "int64"}[kind]
        for name, kind in re.findall(r"val (\w+)Data = Tensor\.allocate(\w+)Buffer", code)
        + re.findall(r"let (\w+) = Tensor<(\w+)>\(", code)
    }
    assert found == {tensor.name: tensor.dtype for tensor in manifest.method(Role.TRAIN).inputs}


@both
def test_outputs_are_read_where_the_manifest_has_them(code: str, manifest: Manifest):
    train, grad = ([t.name for t in manifest.method(role).outputs] for role in (Role.TRAIN, Role.GRAD))
    assert (train, grad) == (["w", "loss_sum"], ["grad_sum", "loss_sum", "count"])
    read = re.findall(r"outputs\[(\d)\]", code)
    assert sorted(read) == sorted([*"01", *"012"])


def interpolated(template: str, values: dict[str, str]) -> str:
    """A Kotlin raw string or a Swift one, its variables filled in."""
    return re.sub(
        r"\\#\((\w+)\)|\$\{(\w+)\}|\$(\w+)", lambda found: values[next(filter(None, found.groups()))], template
    )


@both
def test_requests_are_signed_as_the_server_expects(code: str):
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    device_id, nonce = device_id_of(key.public_key().public_bytes_raw()), "ab" * 16
    headers = sign_request(key, device_id, "PUT", "/v1/reports/1", b"body", nonce=nonce)
    values = {"deviceId": device_id, "deviceID": device_id, "nonce": nonce, "method": "PUT", "path": "/v1/reports/1"}
    written = re.search(r'(?:"""|#")(\("@method".*?)(?:"""|"#)\n', code)
    assert written is not None
    values |= {"params": interpolated(written[1], values), "digest": headers["content-digest"]}
    assert f"sig1={values['params']}" == headers["signature-input"]

    text = re.search(r'"""\n(\s+"@method": .*?)\n\s+"""', code, re.DOTALL)
    assert text is not None
    signed = interpolated("\n".join(line.strip() for line in text[1].splitlines()), values)
    signature = headers["signature"].removeprefix("sig1=:").removesuffix(":")
    key.public_key().verify(base64.b64decode(signature), signed.encode())
    assert set(re.findall(r'"([a-z-]+)"(?: to|:) "?(?:digest|sig1)', code)) == set(headers)


@both
def test_frames_are_the_one_encoding(code: str):
    names = re.search(r"names = (?:listOf\(|\[)(.*?)[)\]]\n", code, re.DOTALL)
    assert names is not None
    keys = re.findall(r'"(\w+)"', names[1])
    assert keys == sorted(ReportFacts.model_fields)
    facts = dict.fromkeys(keys, "x")
    metadata = ",".join(f'"{name}":"{facts[name]}"' for name in keys)
    size = 3
    code = code.replace("4 * size", "bytes")  # an expression, which is checked right here
    tensor, raw = (
        re.search(pattern, code, re.MULTILINE)
        for pattern in (r'tensor = (?:"""|#")(.*?)(?:"""|"#)$', r'raw = (?:"""|#")(.*?)(?:"""|"#)$')
    )
    assert tensor is not None
    assert raw is not None
    entry = interpolated(tensor[1], {"size": str(size), "bytes": str(4 * size)})
    header = interpolated(raw[1], {"metadata": metadata, "tensor": entry}).encode()
    header += b" " * (-len(header) % 8)
    assert json.loads(header)["__metadata__"] == facts
    frame = decode_frame(len(header).to_bytes(8, "little") + header + bytes(4 * size))
    assert list(frame.tensors) == ["update"]
    assert frame.metadata == facts


def test_the_report_id_is_the_sdks():
    written = re.search(r'sign\("([a-z ]+)\$assignmentId"', KOTLIN)
    assert written is not None
    raw, assignment = bytes(range(32)), "ab" * 16
    signature = Ed25519PrivateKey.from_private_bytes(raw).sign((written[1] + assignment).encode())
    expected = DeviceIdentity.from_private_bytes(raw).report_id(assignment)
    assert hashlib.sha256(signature).hexdigest()[:32] == expected


def test_every_file_of_vectors_is_listed_once():
    section = PAGE.split("## The vectors a host must pass")[1].split("\n## ")[0]
    listed = re.findall(r"^\| \d \| `(\w+\.json)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(VECTORS)


def test_what_the_page_calls_by_name_exists():
    protocol = (ROOT / "docs/protocol.md").read_text()
    for path in set(re.findall(r"/v1/[a-z-]+", PAGE)):
        assert path in protocol, path
    assert "training-failed" in AbandonRequest.model_json_schema()["properties"]["reason"]["enum"]
    assert {"min_s", "max_s"} == set(RetryWindow.model_fields)
    assert f"/v{PROTOCOL_VERSION}/devices" in PAGE
    fields = set(Manifest.model_fields)
    assert {"executorch_version", "operators"} <= fields
