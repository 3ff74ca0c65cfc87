"""Explains failed files and connections to the user, by kind of error."""

import errno
import os
import re

_FULL = 'make room'
_PATH = 'check the path'
_OWN = 'check its rights, or name a path of your own'
# {errno: (fact, cure)}; {} is the path.
_OF_THE_USER = {
  errno.ENOENT: ('{} does not exist', _PATH),
  errno.ENOTDIR: ('a part of the path {} is a file, not a folder', _PATH),
  errno.EISDIR: ('{} is a folder, and a file is needed', 'name a file'),
  errno.EEXIST: ('{} is there already', 'name another'),
  errno.ENAMETOOLONG: ('{} is longer than a name may be', 'shorten it'),
  errno.ELOOP: ('the links at {} lead in a circle', _PATH),
  errno.EACCES: ('permission denied: {}', _OWN),
  errno.EPERM: ('permission denied: {}', _OWN),
  errno.EROFS: ('{} is on a read-only file system', 'name a path elsewhere'),
}
_OF_THE_MACHINE = {
  errno.ENOSPC: ('No space left on device: {}', _FULL),
  errno.EDQUOT: ('the disk quota is used up at {}', _FULL),
  errno.EFBIG: ('{} is larger than its disk lets a file be', _FULL),
  errno.EIO: ('Input/output error: the disk of {} failed', 'replace the disk'),
  errno.ESTALE: ('the network disk of {} was lost', 'mount it again'),
  errno.EMFILE: (
    'Too many open files, at {}',
    'raise the limit (ulimit -n)',
  ),
  errno.ENFILE: ('the machine has too many files open, at {}', 'close some'),
  errno.ENOMEM: ('no memory is left, at {}', 'free some'),
}
_KINDS = {**_OF_THE_USER, **_OF_THE_MACHINE}
# Libraries quote the system's message, with or without its number.
_NUMBER = re.compile(r'(?:[Oo][Ss] error |Errno |code: )(\d+)')
_WORDS = (
  errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO,
  errno.EMFILE,
)  # fmt: skip
_QUOTED_PATH = re.compile(r'["\'](/[^"\']+)["\']')


def sentence(error: BaseException) -> str:
  """Returns the cause of an error and its cure; '' for an unknown kind.

  Args:
    error: An OSError, or a library's error that quotes or wraps one.
  """
  number, path = _number_and_path(error)
  if number in _KINDS:
    fact, cure = _KINDS[number]
    if number in _OF_THE_MACHINE:
      cure = f'what was committed is whole: {cure}, and give the same command'
    return f'{fact.format(path or "a file")}; {cure}.'
  if isinstance(error, BrokenPipeError):
    return 'nobody reads the output any more.'
  if isinstance(error, ConnectionError | TimeoutError):
    return (
      f'the network failed ({" ".join(str(error).split())[:200]}); try again '
      'once it works.'
    )
  return ''


def cure(error: BaseException) -> str:
  """Returns what to do about an error, in the imperative."""
  number, _ = _number_and_path(error)
  return (
    _KINDS[number][1] if number in _KINDS else 'make room or replace the disk'
  )


def is_of_the_user(error: BaseException) -> bool:
  """Returns whether a path given by the user caused the error."""
  return _number_and_path(error)[0] in _OF_THE_USER


def is_denied(error: BaseException) -> bool:
  """Returns whether a path is not writable."""
  return _number_and_path(error)[0] in (errno.EACCES, errno.EPERM, errno.EROFS)


def _number_and_path(error):
  """Returns (errno or None, path or '')."""
  while error is not None:
    # From args, because str() of an OSError without a number omits its text
    # once it has a path.
    text = ' '.join(map(str, error.args))
    if isinstance(error, OSError):
      number, path = error.errno, error.filename or error.filename2
      # numpy says this when the disk took only part of an array.
      if re.search(r'\d+ requested and \d+ written', text):
        number = errno.ENOSPC
    else:
      number, path = _number_in(text), None
    if number in _KINDS:
      found = _QUOTED_PATH.search(text)
      return number, path or (found[1] if found else '')
    error = error.__cause__
  return None, ''


def _number_in(text):
  """Returns the errno that a text quotes, or None."""
  if found := _NUMBER.search(text):
    return int(found[1])
  return next(
    (number for number in _WORDS if os.strerror(number) in text), None
  )
