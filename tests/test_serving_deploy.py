"""deploy/: nginx in front of two real services, the systemd unit, and the Dockerfile as far as it can be checked unbuilt."""

import argparse
import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from running import serve

from ernie_kqat.serving import settings
from ernie_kqat.serving.client import connect

ROOT = Path(__file__).parents[1]
NGINX, SYSTEMD_ANALYZE = (
    shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"),
    shutil.which("systemd-analyze"),
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def nginx(folder, **ports):
    """deploy/nginx.conf with other ports and paths; every replacement has to hit."""
    text = (ROOT / "deploy/nginx.conf").read_text(encoding="utf-8")
    for old, new in ports.items():
        assert f"127.0.0.1:{old[1:]}" in text
        text = text.replace(f"127.0.0.1:{old[1:]}", new)
    assert "/run/ernie_kqat_nginx.pid" in text
    text = text.replace("/run/ernie_kqat_nginx.pid", str(folder / "nginx.pid"))
    (folder / "nginx.conf").write_text(text, encoding="utf-8")
    command = [NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", "stderr", "-g", "daemon off;"]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.skipif(NGINX is None, reason="no nginx here")
def test_nginx_spreads_over_two_services_and_survives_one(server, tiny_int8, tmp_path):
    http, grpc = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    with serve(tiny_int8) as second:
        ports = {"_8080": http, "_8081": grpc, "_8866": server.http, "_8876": second.http, "_8867": server.grpc}
        with nginx(tmp_path, **ports, _8877=second.grpc):
            with connect(f"http://{http}") as service:
                direct = service.predict(["a good film"], logits=True)
            before = [requests(one) for one in (server, second)]
            for url in (f"http://{http}", f"grpc://{grpc}"):
                with connect(url, connections=4) as service:
                    for _ in range(10):
                        assert service.predict(["a good film"], logits=True) == direct
            assert all(requests(one) > count for one, count in zip((server, second), before)), "both had a share"
            second.process.kill()
            for url in (f"http://{http}", f"grpc://{grpc}"):
                with connect(url, retries=0) as service:
                    for _ in range(10):
                        assert service.predict(["a good film"], logits=True) == direct


def requests(running):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{running.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("ernie_kqat_requests_total")
    )


def options_of_serve():
    """The parser of tools/serve.py."""
    parser = argparse.ArgumentParser()
    settings.add_options(parser)
    return parser


def test_the_options_in_deploy_exist():
    parser = options_of_serve()
    unit = re.search(
        r"^ExecStart=\S+ \S+/tools/serve.py (.*)$", (ROOT / "deploy/ernie_kqat.service").read_text(), re.M
    )[1]
    docker = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    entry, command = (json.loads(re.search(rf"^{name} (.*)$", docker, re.M)[1]) for name in ("ENTRYPOINT", "CMD"))
    for words in (shlex.split(unit), [*entry[2:], *command]):
        _, unknown = parser.parse_known_args(words)
        assert unknown == []


def test_what_the_dockerfile_copies_exists():
    docker = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    sources = [word for line in re.findall(r"^COPY (.*)$", docker, re.M) for word in line.split()[:-1]]
    assert "ernie_kqat" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
    assert re.search(r"^USER (?!root)", docker, re.M)
    assert "tools/make_venv.py" in sources


@pytest.mark.skipif(SYSTEMD_ANALYZE is None, reason="no systemd-analyze here")
def test_systemd_takes_the_unit(tmp_path):
    text = (ROOT / "deploy/ernie_kqat.service").read_text(encoding="utf-8")
    unit = tmp_path / "ernie_kqat.service"
    unit.write_text(text.replace("/opt/ernie_kqat/.venv/bin/python", "/bin/true"), encoding="utf-8")
    done = subprocess.run([SYSTEMD_ANALYZE, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ernie_kqat.service" not in done.stderr, "no unknown key, no wrong value"


def test_nginx_limits_are_those_of_the_service():
    parser = options_of_serve()
    text = (ROOT / "deploy/nginx.conf").read_text(encoding="utf-8")
    assert re.search(r"client_max_body_size (\d+)m;", text)[1] == "1"
    assert parser.get_default("max_body_bytes") == 1 << 20
    assert int(re.search(r"proxy_read_timeout (\d+)s;", text)[1]) > parser.get_default("timeout_s")
