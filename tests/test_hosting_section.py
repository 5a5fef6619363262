"""The README's hosting section, taken at its word: its site in nginx, its command, its container.

What is marked `CHANGE` is changed to what there is on this machine, and nothing else is.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from onnx import ModelProto, helper
from playwright.sync_api import Browser, FrameLocator, Page, expect

from inspector.backup import restore
from inspector.store import Workspace
from tests.browser import CHART, ended, free_port
from tests.hosted import ADA, COOKIE_SECRET, workspace_of
from tests.openid import CLIENT_ID, running_provider
from tests.readme import README, ROOT
from tests.samples import array, floats, model, save

INSTALLED = "/opt/quant-inspector"
DATA = "/var/lib/quant-inspector"
# Chromium leads every name below localhost to this machine; Streamlit knows only the word itself.
HOST = "quant.localhost"
PATIENCE = 240_000
SAMPLE = ROOT / "sample_models" / "digit-detector"


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind in the hosting section."""
    section = README.read_text(encoding="utf-8").split("## Where things lie, and hosting\n")[1]
    fenced = re.compile(rf"^( *)```{kind}\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(found[2]) for found in fenced.finditer(section)]


def changed(block: str, values: Mapping[str, str]) -> str:
    """The block with its marked values changed; each marked line holds one of the values."""
    lines = []
    for line in block.splitlines():
        text, mark, _ = line.partition("# CHANGE")
        if not mark:
            assert "example.org" not in line, f"not marked: {line}"
            lines.append(line)
            continue
        found = [value for value in values if value in text]
        assert len(found) == 1, line
        lines.append(text.replace(found[0], values[found[0]]))
    return "\n".join(lines) + "\n"


def unit() -> dict[str, list[str]]:
    """The values of the systemd unit by their names."""
    (text,) = blocks("ini")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, sign, value = line.partition("=")
        if sign:
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_starts_an_app_that_the_sites_proxy_finds() -> None:
    found = unit()
    (command,) = found["ExecStart"]
    (site,) = blocks("nginx")
    assert found["WorkingDirectory"] == [INSTALLED]
    assert f"{INSTALLED}/.venv/bin/streamlit run app.py" in command
    options = dict(zip(*[iter(shlex.split(command)[3:])] * 2, strict=True))
    address = f"http://{options['--server.address']}:{options['--server.port']}"
    assert f"proxy_pass {address};" in site
    assert f"location /{options['--server.baseUrlPath']}/ {{" in site
    assert f"Environment=QUANT_INSPECTOR_DATA=/var/lib/{found['StateDirectory'][0]}" in (
        f"Environment={each}" for each in found["Environment"]
    )
    (secrets,) = blocks("toml")
    section = tomllib.loads(secrets)["auth"]
    assert section["redirect_uri"].endswith(f"/{options['--server.baseUrlPath']}/oauth2callback")


# ------------------------------------------------------------------------------- the container


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Containerfile, continued lines joined."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, " ".join(rest.split())) for word, _, rest in (x.partition(" ") for x in lines)]


def test_the_container_copies_what_there_is_and_all_that_the_app_needs(tmp_path: Path) -> None:
    copied: set[str] = set()
    for word, rest in instructions():
        assert word in {
            *("FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "EXPOSE"),
            *("HEALTHCHECK", "CMD"),
        }, word
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                copied.add(source)
                into = tmp_path / target
                into.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, into, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / source, into)
    assert {"inspector", "pages", "app.py", "pyproject.toml"} <= copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in (project["readme"], *project["license-files"]):
        assert name in copied
    assert not list(tmp_path.rglob("secrets.toml"))


def test_the_container_runs_as_nobody_special_and_holds_no_secret() -> None:
    found = instructions()
    words = [word for word, _ in found]
    assert words[0] == "FROM"
    assert words.index("USER") < words.index("CMD")
    assert words[-1] == "CMD"
    (user,) = (rest for word, rest in found if word == "USER")
    assert user not in ("root", "0")
    assert any(f"useradd --uid 10001 --create-home --shell /usr/sbin/nologin {user}" in rest
               for word, rest in found if word == "RUN")  # fmt: skip
    variables = container_variables()
    assert ("VOLUME", variables["QUANT_INSPECTOR_DATA"]) in found
    assert not [name for name in variables if "SECRET" in name]
    image = found[0][1]
    lowest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest is not None
    assert image == f"docker.io/library/python:{lowest[1]}-slim"


def container_variables() -> dict[str, str]:
    (text,) = (rest for word, rest in instructions() if word == "ENV")
    return dict(each.split("=", 1) for each in text.split())


@pytest.mark.slow
def test_the_containers_command_starts_a_server_that_its_check_finds_healthy(
    tmp_path: Path,
) -> None:
    found = dict(instructions())
    port = str(free_port())
    command = [each.replace("8501", port) for each in json.loads(found["CMD"])]
    check = json.loads(found["HEALTHCHECK"].partition(" CMD ")[2])
    check = [each.replace("8501", port) for each in check]
    assert found["EXPOSE"] == "8501"
    with running_provider("https://quant.example.org/quant/oauth2callback") as provider:
        secrets = tmp_path / "secrets.toml"
        secrets.write_text(provider.secrets_toml(COOKIE_SECRET), encoding="utf-8")
        variables = {**container_variables(), "QUANT_INSPECTOR_DATA": str(tmp_path / "data")}
        environment = {
            **os.environ,
            **variables,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        process = subprocess.Popen(
            [*command, "--secrets.files", str(secrets)],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            unhealthy = subprocess.run(check, env=environment, capture_output=True, check=False)
            assert unhealthy.returncode != 0, "it cannot be up already"
            deadline = time.monotonic() + 120
            while subprocess.run(
                check, env=environment, capture_output=True, check=False
            ).returncode:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline
                time.sleep(0.2)
            answer = httpx.get(f"http://127.0.0.1:{port}/quant/_stcore/metrics")
            assert answer.status_code == 401
        finally:
            ended(process)


# ------------------------------------------------------------------------------------ the site


@dataclass(frozen=True, kw_only=True)
class Site:
    """The portal as people reach it.

    Attributes:
        address: with the base path.
        plain: of the port without TLS.
        upstream: of the app itself, which only this machine reaches.
        data: its folder.
        log: what the app has written to standard error.
    """

    address: str
    plain: str
    upstream: str
    data: Path
    log: Path


def write_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "quant.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "quant.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@contextlib.contextmanager
def running_nginx(folder: Path, site: str) -> Iterator[None]:
    """Debian's nginx with the site, as its own configuration would include it."""
    folder.joinpath("site").write_text(site, encoding="utf-8")
    me = "user root;" if os.geteuid() == 0 else ""
    folder.joinpath("nginx.conf").write_text(
        f"daemon off; {me} worker_processes 1; pid {folder}/nginx.pid;\n"
        f"error_log {folder}/error.log;\nevents {{ }}\n"
        "http { include /etc/nginx/mime.types; access_log off;\n"
        f"client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n"
        f"include {folder}/site; }}\n",
        encoding="utf-8",
    )
    command = ["nginx", "-p", str(folder), "-e", f"{folder}/error.log"]
    command += ["-c", f"{folder}/nginx.conf"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if shutil.which("nginx") is None:
        reason = "no nginx (Debian: apt-get install nginx-light)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosting")
    secure, plain, inner = (free_port() for _ in range(3))
    write_certificate(folder)
    (nginx,) = blocks("nginx")
    nginx = changed(
        nginx,
        {
            "listen 80": f"listen 127.0.0.1:{plain}",
            "listen 443": f"listen 127.0.0.1:{secure}",
            "quant.example.org": HOST,
            "/etc/ssl/certs/quant.pem": str(folder / "quant.pem"),
            "/etc/ssl/private/quant.key": str(folder / "quant.key"),
            "127.0.0.1:8501": f"127.0.0.1:{inner}",
        },
    )
    (secrets,) = blocks("toml")
    (command,) = unit()["ExecStart"]
    words = [
        each.replace(f"{INSTALLED}/.venv/bin", str(Path(sys.executable).parent))
        .replace("8501", str(inner))
        for each in shlex.split(command)
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        address = f"https://{HOST}:{secure}/quant"
        provider = stack.enter_context(running_provider(f"{address}/oauth2callback"))
        section = changed(
            secrets,
            {
                "quant.example.org": f"{HOST}:{secure}",
                "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'": COOKIE_SECRET,
                '"quant-inspector"': f'"{CLIENT_ID}"',
                "of the provider": provider.client.secret,
                "https://login.example.org": provider.address,
            },
        )
        (folder / "secrets.toml").write_text(section, encoding="utf-8")
        variables = dict(each.split("=", 1) for each in unit()["Environment"])
        assert variables["QUANT_INSPECTOR_DATA"] == DATA
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            [*words, "--secrets.files", str(folder / "secrets.toml")],
            cwd=ROOT, env={**os.environ, **variables, "QUANT_INSPECTOR_DATA": str(folder / "data")},
            stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
        stack.callback(ended, process)
        stack.enter_context(running_nginx(folder, nginx))
        found = Site(
            address=address,
            plain=f"http://127.0.0.1:{plain}",
            upstream=f"http://127.0.0.1:{inner}/quant",
            data=folder / "data",
            log=folder / "log",
        )
        deadline = time.monotonic() + 120
        while not answers(found):
            assert process.poll() is None, found.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield found


def answers(site: Site) -> bool:
    try:
        return asked(site, "/quant/healthz").status_code == 200
    except httpx.ConnectError:
        return False


def asked(site: Site, path: str, method: str = "GET", **more: object) -> httpx.Response:
    """An answer of nginx, by the address of this machine."""
    port = site.address.split(":")[2].split("/")[0]
    headers = {"Host": f"{HOST}:{port}", **dict(more.pop("headers", {}))}  # type: ignore[call-overload]
    with httpx.Client(verify=False, timeout=60) as client:
        url = f"https://127.0.0.1:{port}{path}"
        return client.request(method, url, headers=headers, **more)  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_answer_of_the_site_has_its_headers_and_tells_no_version(site: Site) -> None:
    for path in ("/quant/healthz", "/quant/", "/quant/inspector/held/x", "/quant/../x", "/else"):
        headers = asked(site, path).headers
        assert headers["strict-transport-security"] == "max-age=31536000", path
        assert headers.get_list("x-content-type-options") == ["nosniff"], path
        assert headers["x-frame-options"] == "SAMEORIGIN", path
        assert headers["server"] == "nginx", path


@pytest.mark.slow
def test_the_site_leads_to_tls_and_shows_nothing_beside_its_base_path(site: Site) -> None:
    answer = httpx.get(f"{site.plain}/quant/overview?run=1", headers={"Host": HOST})
    assert answer.status_code == 301
    assert answer.headers["location"] == f"https://{HOST}/quant/overview?run=1"
    assert asked(site, "/quant").headers["location"] == "/quant/"
    for path in ("/", "/healthz", "/quantum/", "/quant/metrics", "/_stcore/health"):
        assert asked(site, path).status_code == 404, path
    assert httpx.get(f"{site.upstream}/metrics").status_code == 200


@pytest.mark.slow
def test_what_the_app_refuses_it_refuses_through_the_site(site: Site) -> None:
    assert asked(site, "/quant/inspector/held/x").status_code == 401
    assert asked(site, "/quant/_stcore/metrics").status_code == 401
    elsewhere = {"Origin": "https://elsewhere.example"}
    put = asked(site, "/quant/inspector/upload/x/1", "PUT", headers=elsewhere, content=b"x")
    assert put.status_code == 401
    large = asked(site, "/quant/inspector/upload/x/1", "PUT", content=bytes(65 << 20))
    assert large.status_code in (401, 413)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, ignore_https_errors=True, accept_downloads=True
    )
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    try:
        yield context.new_page()
    finally:
        context.close()


def go_to(page: Page, name: str) -> None:
    page.get_by_test_id("stSidebar").get_by_role("link", name=name).click()


def pane(page: Page, side: str) -> FrameLocator:
    return page.frame_locator(f'iframe[title^="{side}" i]')


@pytest.mark.slow
@pytest.mark.browser
def test_the_main_path_works_behind_the_site_of_the_readme(
    site: Site, page: Page, tmp_path: Path
) -> None:
    failed: list[str] = []
    insecure: list[str] = []
    page.on(
        "response",
        lambda got: (
            failed.append(f"{got.status} {got.url}")
            if got.status >= 400 and not got.url.endswith(("_stcore/health", "_stcore/host-config"))
            else None
        ),
    )
    page.on(
        "request",
        lambda sent: (
            insecure.append(sent.url)
            if not sent.url.startswith((site.address, "data:", "blob:"))
            else None
        ),
    )
    # Sign in, and come out where one wanted to go.
    page.goto(f"{site.address}/models")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_label("Address").fill(ADA)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".st-key-context").get_by_role("button", name="Ada@")).to_be_visible()
    expect(page).to_have_url(f"{site.address}/models")
    cookies = [each for each in page.context.cookies() if each["domain"] == HOST]
    signed = [each for each in cookies if each["name"] == "_streamlit_user"]
    assert signed
    for each in signed:
        assert each["secure"], each["name"]
        assert each["httpOnly"], each["name"]
        assert each["path"] == "/quant"
        assert each["sameSite"] == "Lax"
    insecure.clear()  # the provider's own address

    # A sample, loaded and looked at.
    page.locator(".st-key-sample-digit-detector button").click()
    expect(page.get_by_text("slice is silent")).to_be_visible()
    expect(page.locator(CHART).first).to_be_visible()
    expect(page).to_have_url(
        re.compile(rf"^{re.escape(site.address)}/overview\?run=[0-9a-f]{{32}}")
    )
    go_to(page, "Tensors")
    histogram = page.locator(".st-key-picture-histogram .js-plotly-plot")
    expect(histogram).to_be_visible()
    go_to(page, "Graph")
    for side in ("float", "quantized"):
        expect(pane(page, side).locator(".graph-node").first).to_be_visible()

    # A node left in float: previewed, made, compared.
    go_to(page, "Exclusions")
    grid = page.get_by_test_id("stDataFrame").first
    grid.click(position={"x": 36, "y": 36 + 16})
    page.keyboard.press("Space")
    expect(page.get_by_text("1 node to leave in float")).to_be_visible()
    page.get_by_role("button", name="Re-quantize").click()
    expect(page.get_by_text("run 2").first).to_be_visible()
    workspace = Workspace(workspace_of(site.data, ADA))
    (pair,) = workspace.pairs()
    made = workspace.runs(pair.id)[-1]
    assert made.exclusions == ("/head/Concat_3",)
    go_to(page, "Report")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    report = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert report["format"] == "quant-inspector/comparison"
    shown = workspace.comparison(made.id)
    assert [each["sqnr_db"] for each in report["outputs"]] == [
        each["sqnr_db"] for each in shown["outputs"]
    ]

    # A model of one's own, larger than one part of an upload.
    own = tmp_path / "larger.onnx"
    save(large_model(), own)
    assert own.stat().st_size > 9 << 20
    go_to(page, "Models")
    page.get_by_text("Load your own models").click()
    page.locator(".st-key-upload-float input[type=file]").set_input_files(own)
    expect(page.get_by_text("Still missing: inputs")).to_be_visible()

    assert insecure == []
    # The pages themselves are looked for beside the address once, which Streamlit does not mind.
    assert [each for each in failed if "/inspector/" in each or each[0] == "5"] == []

    # Sign out.
    page.get_by_role("button", name="Ada@").click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("Sign in to continue")).to_be_visible()
    assert "_streamlit_user" not in {each["name"] for each in page.context.cookies()}
    events = [json.loads(line) for line in (site.data / "audit.jsonl").read_text().splitlines()]
    told = [(each["event"], each["user"]) for each in events if each["user"]]
    assert told == [("sign-in", ADA), ("sign-out", ADA)]
    lines = [json.loads(line) for line in site.log.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    assert not [each for each in lines if each["level"] in ("error", "critical")]
    assert "digit" not in json.dumps(lines)
    assert ADA not in json.dumps([each for each in lines if "audit" not in each])

    # A backup, with the command of the section.
    (words,) = (b for b in blocks("bash") if "quant-inspector backup" in b)
    archive = tmp_path / "b.tar.gz"
    command = words.splitlines()[0].replace(DATA, str(site.data))
    command = command.replace("/var/backups/quant-inspector/today.tar.gz", str(archive))
    installed = "/opt/quant-inspector/.venv/bin/quant-inspector"
    command = command.replace(installed, f"{sys.executable} -m inspector.cli")
    subprocess.run(shlex.split(command), cwd=ROOT, check=True, capture_output=True)
    restore(archive, tmp_path / "restored")
    again = Workspace(workspace_of(tmp_path / "restored", ADA))
    assert again.comparison(made.id) == shown
    assert again.run(made.id).model.path.read_bytes() == made.model.path.read_bytes()


def large_model() -> ModelProto:
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        [("x", [1, 1600])],
        [("y", [1, 1600])],
        [array("w", floats((1600, 1600), 1))],
    )
