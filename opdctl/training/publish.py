"""Students to the model hub, when a command asks for it by name."""

from pathlib import Path

from opdctl.errors import ExitCode, OpdctlError


def check(repo: str) -> None:
    """Raise OpdctlError unless `repo` can name a model on the hub, OWNER/NAME, and there is a token to write with."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OpdctlError(f"--push {repo}: {str(error).splitlines()[0]}", hint="give OWNER/NAME") from error
    if "/" not in repo:
        raise OpdctlError(f"--push {repo}: whose repository?", hint="give OWNER/NAME")
    if get_token() is None:
        hint = "`hf auth login`, or put a token that may write into HF_TOKEN"
        raise OpdctlError(f"--push {repo}: there is no token for the hub", hint=hint, code=ExitCode.REACH)


def push(folder: Path, repo: str, message: str) -> str:
    """Upload a model directory with its card, and return the commit's address. A repository that is not there is made,
    private. Raises OpdctlError (code 5) where the hub is out of reach or refuses; the directory is not touched."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # the hub's client raises its own, httpx' and OS errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OpdctlError(
            f"--push {repo}: the hub did not take it: {reason}",
            hint=f"the student is whole, {folder}; the same command tries again, so does `hf upload {repo} {folder}`",
            code=ExitCode.REACH,
        ) from error
