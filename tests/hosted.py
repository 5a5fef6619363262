"""A portal for the tests: two people with watermarked models, real servers, real sign-ins."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from onnx import helper

from inspector import hosting, workbench
from inspector.store import FeedSource, Workspace
from tests.browser import ended, free_port, served, started
from tests.openid import Provider, running_provider
from tests.samples import ROOT, array, floats, model, save
from tests.stream import Tab

HEADER = "X-Forwarded-Email"
ADA, BOB = "Ada@example.org", "bob@example.org"
COOKIE_SECRET = "a-cookie-secret-that-only-the-tests-know"
PAGES = ("", "models", "overview", "tensors", "graph", "exclusions", "recipes", "report")


def watermark(address: str) -> str:
    """What stands in names of the models, feeds and pairs of a person and nowhere else."""
    return f"markof{hosting.user_key(address)[:8]}"


def workspace_of(data: Path, address: str) -> Path:
    return hosting.workspace_folder(data, hosting.user_key(address))


def fill(data: Path, address: str) -> str:
    """The id of a run in the person's workspace, of a watermarked model."""
    mark, root = watermark(address), workspace_of(data, address)
    folder = data.parent / f"sources-{mark}"
    folder.mkdir(parents=True)
    float_model = model(
        [
            helper.make_node("Gemm", ["x", "w"], [f"{mark}_hidden"], f"{mark}_gemm", transB=1),
            helper.make_node("Relu", [f"{mark}_hidden"], ["y"], f"{mark}_relu"),
        ],
        [("x", [1, 4])],
        [("y", [1, 3])],
        [array("w", floats((3, 4), 1))],
    )
    save(float_model, folder / f"{mark}.onnx")
    np.savez(folder / f"{mark}.npz", x=floats((8, 4), 2)[:, None])
    workspace = Workspace(root)
    stored = workspace.add_model(folder / f"{mark}.onnx", f"{mark}.onnx")
    feeds = workspace.add_feeds({f"{mark}.npz": folder / f"{mark}.npz"}) / f"{mark}.npz"
    return workbench.load_pair(
        root,
        float_path=stored.path,
        quantized_path=None,
        inputs=FeedSource(kind="stored", path=str(feeds), title=f"{mark}.npz"),
        title=mark,
    )


def load_files(
    data: Path, address: str, float_model: Path, quantized: Path, inputs: Sequence[Path]
) -> str:
    """The id of a run in the person's workspace, of files that were put there beside the app."""
    root = workspace_of(data, address)
    workspace = Workspace(root)
    feeds = workspace.add_feeds({each.name: each for each in inputs})
    path = feeds if len(inputs) > 1 else feeds / inputs[0].name
    return workbench.load_pair(
        root,
        float_path=workspace.add_model(float_model, float_model.name).path,
        quantized_path=workspace.add_model(quantized, quantized.name).path,
        inputs=FeedSource(kind="stored", path=str(path), title=watermark(address)),
        title=watermark(address),
    )


@dataclass(frozen=True, kw_only=True)
class Portal:
    """A running portal.

    Attributes:
        address: of the app, with its base path.
        data: its folder.
        provider: where people sign in; None where a header says who they are.
        secret: that the proxy sends with the header; "" where it need not.
        process: the server; None where it is not ours to know.
    """

    address: str
    data: Path
    provider: Provider | None = None
    secret: str = ""
    process: subprocess.Popen[bytes] | None = None
    cookies: dict[str, dict[str, str]] = field(default_factory=dict)

    def identity(self, address: str) -> dict[str, dict[str, str]]:
        """The headers or cookies of a person, as arguments for `Tab` and httpx."""
        if not address:
            return {"headers": {}, "cookies": {}}
        if self.provider is None:
            secret = {hosting.SECRET_HEADER: self.secret} if self.secret else {}
            return {"headers": {HEADER: address, **secret}, "cookies": {}}
        if address not in self.cookies:
            self.cookies[address], _ = sign_in(self.address, address)
        return {"headers": {}, "cookies": self.cookies[address]}

    def tab(self, address: str, **more: str) -> Tab:
        return Tab(self.address, **self.identity(address), **more)

    def client(self, address: str) -> httpx.Client:
        """Requests of a person; redirects are not followed."""
        return httpx.Client(base_url=self.address, timeout=60, **self.identity(address))


def sign_in(app: str, address: str, page: str = "") -> tuple[dict[str, str], str]:
    """The cookies of a browser that went the whole way to the provider and back, and where it is.

    Args:
        app: the portal's address.
        address: whom the provider is told.
        page: which the browser asks for first.
    """
    with Tab(app) as tab, httpx.Client(timeout=60, cookies=tab.cookies) as browser:
        assert browser.get(f"{app}/{page}").status_code == 200
        tab.open()
        start = re.search(rb"/auth/login\?provider=[\w.-]+", tab.press("Sign in"))
        assert start is not None
        form = browser.get(app + start[0].decode(), follow_redirects=True)
        hidden = dict(re.findall(r'name="(\w+)" value="([^"]*)"', form.text))
        hidden = {key: value.replace("&amp;", "&") for key, value in hidden.items()}
        url = form.url.copy_with(query=None)
        answer = browser.post(url, data={**hidden, "address": address}, follow_redirects=True)
        assert answer.status_code == 200, [str(each.url) for each in (*answer.history, answer)]
        assert str(answer.url).startswith(app)
        found = {each.name: str(each.value) for each in browser.cookies.jar}
        return found, str(answer.url).removeprefix(app)


@contextlib.contextmanager
def header_portal(
    data: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[Portal]:
    """A portal behind a proxy on this machine; what it says is added to the log."""
    variables = portal_variables(data, environment)
    port = free_port()
    process = started(ROOT, variables, *options, port=port, log=log)
    try:
        yield Portal(
            address=f"http://127.0.0.1:{port}",
            data=data,
            secret=variables.get("QUANT_INSPECTOR_PROXY_SECRET", ""),
            process=process,
        )
    finally:
        ended(process)


def portal_variables(data: Path, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a portal that believes a header."""
    return {
        "QUANT_INSPECTOR_MODE": "portal",
        "QUANT_INSPECTOR_DATA": str(data),
        "QUANT_INSPECTOR_AUTH": f"header:{HEADER}",
        **(environment or {}),
    }


@contextlib.contextmanager
def openid_portal(data: Path, *options: str, base: str = "") -> Iterator[Portal]:
    """A portal with a provider of its own; `base` is the path before every address."""
    port = free_port()
    origin = f"http://127.0.0.1:{port}"
    secrets_file = data.parent / f"secrets-{port}.toml"
    with running_provider(f"{origin}{base}/oauth2callback") as provider:
        secrets_file.write_text(provider.secrets_toml(COOKIE_SECRET), encoding="utf-8")
        variables = {
            "QUANT_INSPECTOR_MODE": "portal",
            "QUANT_INSPECTOR_DATA": str(data),
            "QUANT_INSPECTOR_AUTH": "oidc",
        }
        files = ("--secrets.files", str(secrets_file))
        with served(ROOT, variables, *files, *options, port=port, base=base) as address:
            yield Portal(address=address, data=data, provider=provider)
