"""Published GPT-2s: their files from Hugging Face's hub, fetched once."""

import hashlib
import http.client
import os
import re
import sys
import urllib.request

import torch

import disk


def cache_folder(name):
    """Where a published model's files are kept; the environment's TORCH_HOME moves it."""
    return f"{torch.hub.get_dir()}/checkpoints/{name}"


def fetch_published(name):
    """Fetch a published GPT-2's config.json and weights into its cache_folder, each where there is none.

    Raises OSError with what was tried and where a copy would do. The environment's HF_ENDPOINT names a mirror.
    """
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    for file in ("config.json", "pytorch_model.bin"):
        url = f"{host}/openai-community/{name}/resolve/main/{file}"
        path = f"{cache_folder(name)}/{file}"
        if os.path.exists(path):
            continue
        try:
            fetch(url, path)
        except (OSError, ValueError, http.client.HTTPException) as e:
            why = str(e).strip("<>") or type(e).__name__
            raise OSError(f"{url} could not be fetched ({why}); a copy of it at {path} would do") from None


def fetch(url, path):
    """Fetch url into the file path, all of it or nothing. Over http or https only, redirects included.

    The length must be announced, and is checked; so is the SHA-256 where the server announces it. Raises ValueError
    for another kind of address, OSError or http.client.HTTPException for the rest.
    """
    check_address(url)
    redirects = Redirects()
    with urllib.request.build_opener(redirects).open(url, timeout=30) as response:
        size = response.length
        if size is None:
            raise OSError("its length is not announced, so that a cut could not be told from the end")
        print(f"fetching {url}, {size / 2**20:,.0f} MiB", file=sys.stderr)
        done = 0
        digest = hashlib.sha256()
        with disk.replace_file(path) as f:
            while piece := response.read(2**20):
                f.write(piece)
                digest.update(piece)
                done += len(piece)
                if sys.stderr.isatty():
                    print(f"\r{done / size:4.0%}", end="\n" if done == size else "", file=sys.stderr, flush=True)
            if done != size:
                raise OSError(f"the connection ended after {done:,} of {size:,} bytes")
            announced = redirects.sha256 or announced_sha256(response.headers)
            if announced is not None and announced != digest.hexdigest():
                raise OSError("its SHA-256 is not the one that the server announces")


class Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's, for http and https only; sha256 is what an answer on the way said of the file that it points to."""

    sha256 = None

    def redirect_request(self, request, response, code, message, headers, url):
        check_address(url)
        self.sha256 = announced_sha256(headers) or self.sha256
        return super().redirect_request(request, response, code, message, headers, url)


def check_address(url):
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"only http and https are fetched, not {url}")


def announced_sha256(headers):
    """The SHA-256 in the hub's X-Linked-ETag, or None; for a small file another, shorter hash stands there."""
    tag = headers.get("X-Linked-ETag", "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None
