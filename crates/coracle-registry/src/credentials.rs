//! User names and passwords, from Docker's `config.json` and its credential helpers.
//!
//! Order, as Docker's command line has it: `DOCKER_AUTH_CONFIG`, the helper of this registry (`credHelpers`), the
//! helper of all (`credsStore`), the file itself (`auths`). A helper is a program `docker-credential-<name>` from the
//! search path; it is given a registry on its standard input and answers with JSON, within bounds of time and size.
//!
//! Secrets are `Redacted` from where they are read. Source: `docker/cli` `cli/config`, `docker/docker-credential-helpers`.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use coracle_base::Redacted;
use coracle_base::time::monotonic;
use coracle_oci::reference::DEFAULT_HOST;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Deserialize;

use crate::error::RegistryError;

/// Docker Hub's name in configuration files and helpers.
pub const HUB_KEY: &str = "https://index.docker.io/v1/";
/// The user name that says that the secret is an identity token.
const TOKEN_USER: &str = "<token>";
const CONFIG_BYTES_MAX: u64 = 4 << 20;
const HELPER_BYTES_MAX: u64 = 64 << 10;
/// A helper may have to ask its user for a password.
const HELPER_TIME_MAX: Duration = Duration::from_mins(1);

/// Something that proves who one is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// A name and a password.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: Redacted<String>,
    },
    /// A token to be exchanged for other tokens (`OAuth2`'s refresh token).
    IdentityToken(Redacted<String>),
    /// A token to be shown to the registry as it is.
    RegistryToken(Redacted<String>),
}

/// Where credentials come from.
pub trait CredentialSource: std::fmt::Debug + Send + Sync {
    /// The credential for a registry, by its host as references name it (`docker.io`, `localhost:5000`).
    ///
    /// # Errors
    /// [`RegistryError::Setup`] if there should be one that cannot be had.
    fn get(&self, host: &str) -> Result<Option<Credential>, RegistryError>;
}

/// No credentials at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoCredentials;

impl CredentialSource for NoCredentials {
    fn get(&self, _host: &str) -> Result<Option<Credential>, RegistryError> {
        Ok(None)
    }
}

/// Docker's configuration, as far as it is about credentials.
#[derive(Debug, Clone, Default)]
pub struct DockerConfig {
    /// `DOCKER_AUTH_CONFIG`.
    first: Entries,
    file: Entries,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Entries {
    auths: Option<BTreeMap<String, Entry>>,
    #[serde(rename = "credsStore")]
    creds_store: Option<String>,
    #[serde(rename = "credHelpers")]
    cred_helpers: Option<BTreeMap<String, String>>,
}

impl std::fmt::Debug for Entries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hosts: Vec<&String> = self.auths.iter().flat_map(BTreeMap::keys).collect();
        write!(f, "Entries({hosts:?}, {:?}, {:?})", self.creds_store, self.cred_helpers)
    }
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl DockerConfig {
    /// Reads `config.json` in a directory (no file is an empty one), and the value of `DOCKER_AUTH_CONFIG`.
    ///
    /// # Errors
    /// [`RegistryError::Setup`] if either cannot be read.
    pub fn load(dir: &Path, auth_config: Option<&str>) -> Result<Self, RegistryError> {
        let path = dir.join("config.json");
        let subject = path.display().to_string();
        let file = match read_bounded(&path, CONFIG_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(RegistryError::Setup { subject, reason: error.to_string() }),
        };
        let first = parse("DOCKER_AUTH_CONFIG", auth_config.unwrap_or_default().as_bytes())?;
        // The variable carries credentials only; programs to run are named in the user's file.
        let first = Entries { auths: first.auths, ..Entries::default() };
        Ok(Self { first, file: parse(&subject, &file)? })
    }

    fn helper(&self, host: &str) -> Option<&str> {
        let of_host = self.file.cred_helpers.iter().flatten().find(|(key, _)| is_key_of(key, host));
        let name = of_host.map(|(_, name)| name).or(self.file.creds_store.as_ref());
        name.map(String::as_str).filter(|name| !name.is_empty())
    }
}

impl CredentialSource for DockerConfig {
    fn get(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        if let Some(credential) = self.first.find(host)? {
            return Ok(Some(credential));
        }
        if let Some(name) = self.helper(host) {
            let key = if host == DEFAULT_HOST { HUB_KEY } else { host };
            if let Some(credential) = ask_helper(name, key, HELPER_TIME_MAX)? {
                return Ok(Some(credential));
            }
        }
        self.file.find(host)
    }
}

impl Entries {
    fn find(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        let entries = || self.auths.iter().flatten();
        let exact = entries().find(|(key, _)| key.as_str() == host);
        match exact.or_else(|| entries().find(|(key, _)| is_key_of(key, host))) {
            Some((key, entry)) => entry.credential().map_err(|reason| RegistryError::Setup {
                subject: format!("the credentials of {key}"),
                reason: reason.to_owned(),
            }),
            None => Ok(None),
        }
    }
}

impl Entry {
    fn credential(&self) -> Result<Option<Credential>, &'static str> {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = filled(&self.registrytoken) {
            return Ok(Some(Credential::RegistryToken(Redacted::new(token))));
        }
        if let Some(token) = filled(&self.identitytoken) {
            return Ok(Some(Credential::IdentityToken(Redacted::new(token))));
        }
        let (username, password) = match filled(&self.auth) {
            Some(auth) => {
                let pair = BASE64_STANDARD.decode(auth.trim()).map_err(|_cause| "`auth` is not base64")?;
                let pair = String::from_utf8(pair).map_err(|_cause| "`auth` is not text")?;
                let (name, password) =
                    pair.split_once(':').ok_or("`auth` holds no user name and password")?;
                (name.to_owned(), password.trim_end_matches('\0').to_owned())
            }
            None => match (filled(&self.username), filled(&self.password)) {
                (Some(name), Some(password)) => (name, password),
                _ => return Ok(None),
            },
        };
        Ok(Some(from_pair(username, password)))
    }
}

fn from_pair(username: String, secret: String) -> Credential {
    let password = Redacted::new(secret);
    if username == TOKEN_USER {
        Credential::IdentityToken(password)
    } else {
        Credential::Password { username, password }
    }
}

fn parse(subject: &str, bytes: &[u8]) -> Result<Entries, RegistryError> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Entries::default());
    }
    // The parser's message could quote a secret; its place does not.
    serde_json::from_slice(bytes).map_err(|error| RegistryError::Setup {
        subject: subject.to_owned(),
        reason: format!("it is not the JSON of Docker's configuration (line {})", error.line()),
    })
}

/// Whether a key of the file means this host: keys may be URLs, and Docker Hub has several names.
fn is_key_of(key: &str, host: &str) -> bool {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let name = bare.split('/').next().unwrap_or_default();
    let hub = [DEFAULT_HOST, "index.docker.io", "registry-1.docker.io"];
    // A key with a path means a part of a registry, unless it is the old `/v1/` or `/v2/`.
    let path = bare.get(name.len()..).unwrap_or_default();
    let is_whole = matches!(path, "" | "/" | "/v1" | "/v1/" | "/v2" | "/v2/");
    is_whole && (name.eq_ignore_ascii_case(host) || (hub.contains(&host) && hub.contains(&name)))
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

/// Asks `docker-credential-<name>`.
fn ask_helper(name: &str, key: &str, time_max: Duration) -> Result<Option<Credential>, RegistryError> {
    let program = format!("docker-credential-{name}");
    let setup =
        |reason: String| RegistryError::Setup { subject: format!("credential helper {program:?}"), reason };
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        return Err(setup("its name has characters that no program of this kind has".to_owned()));
    }
    run_helper(Command::new(&program).arg("get"), key, time_max).map_err(setup)
}

/// Runs the program and understands its answer. Errors are reasons.
fn run_helper(command: &mut Command, key: &str, time_max: Duration) -> Result<Option<Credential>, String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let end = monotonic() + time_max;
    let answer = talk(&mut child, key, end);
    if answer.is_err() {
        // It may have ended already; then there is nothing to kill.
        drop(child.kill());
    }
    let status = wait_for(&mut child, end).map_err(|error| error.to_string())?;
    let answer = answer.map_err(|error| error.to_string())?;
    if !status {
        let words = crate::http::printable(&String::from_utf8_lossy(&answer));
        // The words by which helpers say that they have nothing; there is no other sign.
        if words.to_ascii_lowercase().contains("credentials not found") {
            return Ok(None);
        }
        return Err(format!("it failed: {words}"));
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&answer).map_err(|_cause| "it did not answer with JSON".to_owned())?;
    let is_empty = answer.username.is_empty() || answer.secret.is_empty();
    Ok((!is_empty).then(|| from_pair(answer.username, answer.secret)))
}

/// Writes the key and reads all that comes, until `end`.
fn talk(child: &mut Child, key: &str, end: Instant) -> io::Result<Vec<u8>> {
    if let Some(mut stdin) = child.stdin.take() {
        // Smaller than a pipe, so that this cannot block. A helper that does not read it may still answer.
        match stdin.write_all(key.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    let mut stdout = child.stdout.take().ok_or_else(|| io::Error::other("it has no output"))?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        wait_readable(&stdout, end)?;
        match stdout.read(&mut chunk)? {
            0 => return Ok(answer),
            n => answer.extend_from_slice(chunk.get(..n).unwrap_or_default()),
        }
        if u64::try_from(answer.len()).unwrap_or(u64::MAX) > HELPER_BYTES_MAX {
            return Err(io::Error::other(format!("it answered more than {HELPER_BYTES_MAX} bytes")));
        }
    }
}

/// Waits for the end of the program, and kills it when it takes too long. Returns whether it succeeded.
fn wait_for(child: &mut Child, end: Instant) -> io::Result<bool> {
    if child.try_wait()?.is_none() {
        let id = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("no pid"))?;
        let pidfd = pidfd_open(id, PidfdFlags::empty())?;
        if let Err(error) = wait_readable(&pidfd, end) {
            child.kill()?;
            child.wait()?;
            return Err(error);
        }
    }
    Ok(child.wait()?.success())
}

fn wait_readable(fd: &impl std::os::fd::AsFd, end: Instant) -> io::Result<()> {
    loop {
        let left = end.saturating_duration_since(monotonic());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not end in time"));
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Reads a file that may have at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
        return Err(io::Error::other(format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(username: &str, secret: &str) -> Option<Credential> {
        let password = Redacted::new(secret.to_owned());
        Some(Credential::Password { username: username.to_owned(), password })
    }

    fn config(json: &str, auth_config: Option<&str>) -> DockerConfig {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json).unwrap();
        DockerConfig::load(dir.path(), auth_config).unwrap()
    }

    #[test]
    fn the_file_is_read_by_all_names_of_a_registry() {
        let auth = BASE64_STANDARD.encode("ann:se:cret");
        let config = config(
            &format!(
                r#"{{"psFormat": "x", "auths": {{
                    "https://index.docker.io/v1/": {{"auth": "{auth}"}},
                    "reg.example:5000": {{"username": "u", "password": "p"}},
                    "http://old.example/v1/": {{"auth": "{auth}"}},
                    "part.example/team": {{"auth": "{auth}"}},
                    "token.example": {{"identitytoken": "refresh"}},
                    "empty.example": {{}}
                }}}}"#
            ),
            None,
        );
        assert_eq!(config.get("docker.io").unwrap(), password("ann", "se:cret"));
        assert_eq!(config.get("reg.example:5000").unwrap(), password("u", "p"));
        assert_eq!(config.get("reg.example").unwrap(), None, "another port is another registry");
        assert_eq!(config.get("old.example").unwrap(), password("ann", "se:cret"));
        assert_eq!(config.get("part.example").unwrap(), None);
        assert_eq!(config.get("empty.example").unwrap(), None);
        let token = Credential::IdentityToken(Redacted::new("refresh".to_owned()));
        assert_eq!(config.get("token.example").unwrap(), Some(token));
        assert!(!format!("{config:?}").contains("refresh"), "nothing secret is printed");
    }

    #[test]
    fn the_variable_wins_and_names_no_programs() {
        let variable = r#"{"auths": {"a.example": {"username": "env", "password": "p"}}, "credsStore": "x"}"#;
        let config =
            config(r#"{"auths": {"a.example": {"username": "file", "password": "p"}}}"#, Some(variable));
        assert_eq!(config.get("a.example").unwrap(), password("env", "p"));
        assert_eq!(config.get("b.example").unwrap(), None);
    }

    #[test]
    fn what_cannot_be_read_is_said_without_the_secret() {
        let dir = tempfile::tempdir().unwrap();
        assert!(DockerConfig::load(dir.path(), None).is_ok(), "no file is no credentials");
        std::fs::write(dir.path().join("config.json"), r#"{"auths": {"a": {"auth": 12345}}}"#).unwrap();
        let error = DockerConfig::load(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("config.json") && !error.contains("12345"), "{error}");
        let error =
            config(r#"{"auths": {"a": {"auth": "c2VjcmV0"}}}"#, None).get("a").unwrap_err().to_string();
        assert!(error.contains("no user name") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn helpers_with_odd_names_are_not_run() {
        let config = config(r#"{"credsStore": "../../bin/sh"}"#, None);
        assert!(config.get("a.example").unwrap_err().to_string().contains("characters"));
        let config = self::config(r#"{"credHelpers": {"a.example": "coracle-test-missing"}}"#, None);
        assert!(
            config
                .get("a.example")
                .unwrap_err()
                .to_string()
                .contains("docker-credential-coracle-test-missing")
        );
        assert_eq!(config.get("b.example").unwrap(), None, "others do not need it");
    }

    fn helper(script: &str, time_max: Duration) -> Result<Option<Credential>, String> {
        run_helper(Command::new("/bin/sh").args(["-c", script]), "key", time_max)
    }

    #[test]
    fn helpers_are_asked_by_their_standard_input() {
        let minute = Duration::from_mins(1);
        let script = r#"read -r key; echo "{\"ServerURL\":\"$key\",\"Username\":\"$key\",\"Secret\":\"s\"}""#;
        assert_eq!(helper(script, minute).unwrap(), password("key", "s"));
        let token = Credential::IdentityToken(Redacted::new("t".to_owned()));
        assert_eq!(helper(r#"echo '{"Username":"<token>","Secret":"t"}'"#, minute).unwrap(), Some(token));
        let none = "echo credentials not found in native keychain; exit 1";
        assert_eq!(helper(none, minute).unwrap(), None);
        assert_eq!(helper("echo locked; exit 1", minute).unwrap_err(), "it failed: locked");
        assert_eq!(helper("echo secret", minute).unwrap_err(), "it did not answer with JSON");
    }

    #[test]
    fn helpers_are_bounded_in_time_and_output() {
        let late = helper("exec tail -f /dev/null", Duration::from_millis(50));
        assert_eq!(late.unwrap_err(), "it did not end in time");
        assert!(helper("yes", Duration::from_mins(1)).unwrap_err().contains("more than"));
        let mut lingering = Command::new("/bin/sh").args(["-c", "exec tail -f /dev/null"]).spawn().unwrap();
        assert!(wait_for(&mut lingering, monotonic() + Duration::from_millis(50)).is_err());
        assert!(lingering.try_wait().unwrap().is_some(), "it was killed and waited for");
    }
}
