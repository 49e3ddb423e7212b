"""What signed replies cost, beside the verification of the request that the server has always paid.

Ed25519 over a few hundred bytes, with the digest of a small body: what a check-in and its answer are.

    python tests/benchmarks/bench_signing.py [--requests 2000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from client_sdk.identity import DeviceIdentity
from client_sdk.protocol.messages import CheckInReply, Finished
from client_sdk.protocol.signing import reply_signer, verify_request
from server_ref.app.requests import public_key
from server_ref.server_identity import ServerIdentity

PATH = "/v1/check-ins"
BODY = b'{"protocol_version":1,"num_samples":20,"virtual":null}'
REPLY = CheckInReply(reply=Finished(model_version=40)).model_dump_json().encode()


def microseconds(work: Callable[[], object], times: int) -> float:
    """Median over batches of the time of one call."""
    batches = []
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(max(1, times // 20)):
            work()
        batches.append((time.perf_counter() - begun) / max(1, times // 20))
    return 1e6 * statistics.median(batches)


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    times = parser.parse_args().requests
    device, server = DeviceIdentity.generate(), ServerIdentity.generate()
    request = device.sign("POST", PATH, BODY)
    key = public_key(device.public_key.hex())
    reply = dict(server.sign_reply(request["signature"], 200, REPLY))
    sign = microseconds(lambda: server.sign_reply(request["signature"], 200, REPLY), times)
    check = microseconds(lambda: reply_signer(reply, request["signature"], 200, REPLY), times)
    verify = microseconds(lambda: verify_request(key, request, "POST", PATH, BODY), times)
    print(  # noqa: T201 - what a benchmark is for
        json.dumps(
            {
                "bench": "signing", "sign_reply_us": round(sign, 1), "check_reply_us": round(check, 1),
                "verify_request_us": round(verify, 1), "ratio_sign_to_verify": round(sign / verify, 3),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
