"""Published GPT-2s: their weights from Hugging Face's hub, fetched once."""

import http.client
import os
import sys
import urllib.error
import urllib.request

import torch


def cached(name):
    """Where a published model's weights are kept; the environment's TORCH_HOME moves it."""
    return f"{torch.hub.get_dir()}/checkpoints/{name}/pytorch_model.bin"


def fetch_published(name):
    """Fetch a published GPT-2's weights into cached(name), whole and with the announced SHA-256, unless they are there.

    Raises OSError with what was tried and where a copy would do. The environment's HF_ENDPOINT names a mirror.
    """
    path = cached(name)
    if os.path.exists(path):
        return
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{host}/openai-community/{name}/resolve/main/pytorch_model.bin"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        sha256 = announced_sha256(url)
        print(f"fetching {url}", file=sys.stderr)
        torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=sys.stderr.isatty())
    except (OSError, ValueError, RuntimeError, http.client.HTTPException) as e:
        raise OSError(f"{url} could not be fetched; a copy of it at {path} would do ({e})") from None


def announced_sha256(url):
    """The SHA-256 in the hub's X-Linked-ETag, which stands in the answer that leads to the file's own address."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=30) as response:
            headers = response.headers
    except urllib.error.HTTPError as e:
        if e.code not in (301, 302, 303, 307, 308):
            raise
        headers = e.headers
    sha256 = headers.get("X-Linked-ETag", "").strip('"')
    if len(sha256) != 64:
        raise ValueError("the server does not announce its SHA-256")
    return sha256


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None
