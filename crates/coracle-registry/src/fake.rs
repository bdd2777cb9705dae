//! A registry in this process that misbehaves on demand: for tests of this crate and of whoever pulls through it.
//!
//! It speaks enough of HTTP/1.1 and of the distribution-spec for pulls, on a port of 127.0.0.1, with one thread for
//! each connection. [`Fault`]s are attached to parts of paths and used up one by one. Everything ends, and is waited
//! for, when the [`Fake`] is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use coracle_oci::{Algorithm, Digest};

use crate::client::digest_of;

/// How often a waiting connection looks whether the registry ends.
const SLICE: Duration = Duration::from_millis(20);

/// Something that goes wrong.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Another status, with headers and a body.
    Status(u16, Vec<(String, String)>, Vec<u8>),
    /// The connection ends after so many bytes of the body.
    TruncateAfter(usize),
    /// Nothing comes any more after so many bytes of the body.
    StallAfter(usize),
    /// One byte of the body is changed.
    Corrupt,
    /// Another place.
    Redirect(String),
    /// Another `Content-Type`.
    ContentType(String),
    /// `Range` is not understood.
    IgnoreRange,
    /// The connection ends without an answer.
    HangUp,
    /// Another body, in chunks, so that its length is not known before.
    Chunked(Vec<u8>),
    /// Another `Docker-Content-Digest`.
    DigestHeader(String),
}

/// What the registry wants to see before it answers.
#[derive(Debug, Clone, Default)]
pub enum Access {
    /// Nothing.
    #[default]
    Open,
    /// User name and password.
    Basic(String, String),
    /// A token from `/token`, which may want a user name and password in its turn.
    Bearer {
        /// Another token server than this one.
        realm: Option<String>,
        /// Who gets a token; everybody if nobody is named.
        user: Option<(String, String)>,
        /// The identity token that may be posted instead.
        identity: Option<String>,
    },
}

/// One request as it came.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// `GET`, …
    pub method: String,
    /// With its query.
    pub path: String,
    /// By lower-case names; several lines are joined with a comma.
    pub headers: BTreeMap<String, String>,
    /// The body, for posts.
    pub body: String,
}

#[derive(Debug, Default)]
struct State {
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: BTreeMap<(String, String), (String, Vec<u8>)>,
    tags: BTreeMap<String, BTreeSet<String>>,
    access: Access,
    tokens: BTreeSet<String>,
    n_tokens: usize,
    faults: Vec<(String, Fault, usize)>,
    seen: Vec<Seen>,
    connections: Vec<JoinHandle<()>>,
    is_over: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    over: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registry.
#[derive(Debug)]
pub struct Fake {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

impl Fake {
    /// Starts one on a free port.
    ///
    /// # Errors
    /// If there is no loopback to listen on.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let of_listener = Arc::clone(&shared);
        let accept = move || {
            for stream in listener.incoming() {
                let mut state = of_listener.lock();
                if state.is_over {
                    return;
                }
                let shared = Arc::clone(&of_listener);
                if let Ok(stream) = stream {
                    // What a client does to its connection is seen by the client.
                    state
                        .connections
                        .push(std::thread::spawn(move || drop(serve(&shared, &stream, address))));
                }
            }
        };
        Ok(Self { address, shared, listener: Some(std::thread::spawn(accept)) })
    }

    /// `127.0.0.1:<port>`, as references begin with it.
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Keeps a blob.
    pub fn put_blob(&self, bytes: &[u8]) -> Digest {
        let digest = digest_of(Algorithm::Sha256, bytes);
        self.shared.lock().blobs.insert(digest.to_string(), bytes.to_vec());
        digest
    }

    /// Keeps a manifest under its digest and a tag.
    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> Digest {
        let digest = digest_of(Algorithm::Sha256, bytes);
        let mut state = self.shared.lock();
        for name in [tag, digest.as_str()] {
            let key = (repository.to_owned(), name.to_owned());
            state.manifests.insert(key, (media_type.to_owned(), bytes.to_vec()));
        }
        state.tags.entry(repository.to_owned()).or_default().insert(tag.to_owned());
        digest
    }

    /// Asks for credentials from now on.
    pub fn set_access(&self, access: Access) {
        self.shared.lock().access = access;
    }

    /// Makes all tokens invalid that were given out.
    pub fn revoke_tokens(&self) {
        self.shared.lock().tokens.clear();
    }

    /// Makes the next `times` requests fail whose path contains `path_part`.
    pub fn fail(&self, path_part: &str, times: usize, fault: Fault) {
        self.shared.lock().faults.push((path_part.to_owned(), fault, times));
    }

    /// All requests so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let connections = {
            let mut state = self.shared.lock();
            state.is_over = true;
            std::mem::take(&mut state.connections)
        };
        self.shared.over.notify_all();
        // Wakes the listener; that it cannot be reached means that it has ended.
        drop(TcpStream::connect(self.address));
        for thread in connections.into_iter().chain(self.listener.take()) {
            // A thread that panicked has failed its test already.
            drop(thread.join());
        }
    }
}

/// An answer before faults are applied.
#[derive(Debug, Default)]
struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into() }
    }
    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.into()));
        self
    }
    fn error(status: u16, code: &str, message: &str) -> Self {
        let body = format!(r#"{{"errors":[{{"code":"{code}","message":"{message}"}}]}}"#);
        Self::new(status, body).with("Content-Type", "application/json")
    }
}

fn serve(shared: &Shared, stream: &TcpStream, address: SocketAddr) -> io::Result<()> {
    stream.set_read_timeout(Some(SLICE))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    loop {
        let Some(seen) = read_request(shared, &mut reader)? else { return Ok(()) };
        let (reply, fault) = {
            let mut state = shared.lock();
            state.seen.push(seen.clone());
            let fault = next_fault(&mut state, &seen.path);
            (answer(&mut state, &seen, address, matches!(fault, Some(Fault::IgnoreRange))), fault)
        };
        if !send(shared, stream, &seen, reply, fault)? {
            return Ok(());
        }
    }
}

fn next_fault(state: &mut State, path: &str) -> Option<Fault> {
    let (_, fault, left) =
        state.faults.iter_mut().find(|(part, _, left)| *left > 0 && path.contains(part.as_str()))?;
    *left -= 1;
    Some(fault.clone())
}

/// One line, waited for as long as the registry lives.
fn read_line(shared: &Shared, reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    loop {
        match reader.read_until(b'\n', &mut line) {
            Ok(_) if line.ends_with(b"\n") => break,
            Ok(_) => return Ok(None),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                if shared.lock().is_over {
                    return Ok(None);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(String::from_utf8(line).ok().map(|line| line.trim_end().to_owned()))
}

fn read_request(shared: &Shared, reader: &mut impl BufRead) -> io::Result<Option<Seen>> {
    let Some(line) = read_line(shared, reader)? else { return Ok(None) };
    let mut words = line.split(' ');
    let (Some(method), Some(path), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Ok(None);
    };
    if !version.starts_with("HTTP/1") {
        return Ok(None);
    }
    let mut seen = Seen { method: method.to_owned(), path: path.to_owned(), ..Seen::default() };
    loop {
        let Some(line) = read_line(shared, reader)? else { return Ok(None) };
        let Some((name, value)) = line.split_once(':') else { break };
        let all = seen.headers.entry(name.to_ascii_lowercase()).or_default();
        if !all.is_empty() {
            all.push_str(", ");
        }
        all.push_str(value.trim());
    }
    let length = seen.headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0_u64);
    let mut body = Vec::new();
    while u64::try_from(body.len()).unwrap_or(u64::MAX) < length {
        let left = length - u64::try_from(body.len()).unwrap_or(u64::MAX);
        match reader.take(left).read_to_end(&mut body) {
            Ok(0) => return Ok(None),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
    seen.body = String::from_utf8_lossy(&body).into_owned();
    Ok(Some(seen))
}

fn answer(state: &mut State, seen: &Seen, address: SocketAddr, ignore_range: bool) -> Reply {
    let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
    if path == "/token" {
        return give_token(state, seen);
    }
    if let Some(refusal) = check_access(state, seen, address) {
        return refusal;
    }
    let Some(path) = path.find("/v2/").and_then(|at| path.get(at + 4..)) else {
        return Reply::error(404, "UNSUPPORTED", "no such path");
    };
    if path.is_empty() {
        return Reply::new(200, "{}");
    }
    if let Some((repository, name)) = path.split_once("/manifests/") {
        return match state.manifests.get(&(repository.to_owned(), name.to_owned())) {
            Some((media_type, bytes)) => Reply::new(200, bytes.clone())
                .with("Content-Type", media_type)
                .with("Docker-Content-Digest", digest_of(Algorithm::Sha256, bytes).to_string()),
            None => Reply::error(404, "MANIFEST_UNKNOWN", "manifest unknown"),
        };
    }
    if let Some((_, digest)) = path.split_once("/blobs/") {
        return match state.blobs.get(digest) {
            Some(bytes) => ranged(bytes, if ignore_range { None } else { seen.headers.get("range") }),
            None => Reply::error(404, "BLOB_UNKNOWN", "blob unknown to registry"),
        };
    }
    if let Some(repository) = path.strip_suffix("/tags/list") {
        return list_tags(state, repository, query);
    }
    Reply::error(404, "UNSUPPORTED", "no such path")
}

fn ranged(bytes: &[u8], range: Option<&String>) -> Reply {
    let first =
        range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match first {
        None => Reply::new(200, bytes).with("Accept-Ranges", "bytes"),
        Some(first) => match bytes.get(first..).filter(|rest| !rest.is_empty()) {
            Some(rest) => Reply::new(206, rest)
                .with("Content-Range", format!("bytes {first}-{}/{}", bytes.len() - 1, bytes.len())),
            None => Reply::new(416, ""),
        },
    }
}

/// Two tags on each page.
fn list_tags(state: &State, repository: &str, query: &str) -> Reply {
    const PAGE: usize = 2;
    let Some(tags) = state.tags.get(repository) else {
        return Reply::error(404, "NAME_UNKNOWN", "repository name not known to registry");
    };
    let last = query.strip_prefix("last=").unwrap_or_default();
    let after: Vec<&String> = tags.iter().filter(|tag| tag.as_str() > last).collect();
    let page: Vec<String> = after.iter().take(PAGE).map(|tag| format!("\"{tag}\"")).collect();
    let reply = Reply::new(200, format!(r#"{{"name":"{repository}","tags":[{}]}}"#, page.join(",")));
    match after.get(PAGE - 1).filter(|_| after.len() > PAGE) {
        Some(last) => reply.with("Link", format!("</v2/{repository}/tags/list?last={last}>; rel=\"next\"")),
        None => reply,
    }
}

fn check_access(state: &State, seen: &Seen, address: SocketAddr) -> Option<Reply> {
    let sent = seen.headers.get("authorization").map(String::as_str).unwrap_or_default();
    let (is_fine, challenge) = match &state.access {
        Access::Open => (true, String::new()),
        Access::Basic(user, password) => (sent == basic(user, password), r#"Basic realm="fake""#.to_owned()),
        Access::Bearer { realm, .. } => {
            let realm = realm.clone().unwrap_or_else(|| format!("http://{address}/token"));
            let token = sent.strip_prefix("Bearer ").unwrap_or_default();
            (state.tokens.contains(token), format!(r#"Bearer realm="{realm}",service="fake""#))
        }
    };
    let refusal =
        || Reply::error(401, "UNAUTHORIZED", "authentication required").with("WWW-Authenticate", challenge);
    (!is_fine).then(refusal)
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")))
}

fn give_token(state: &mut State, seen: &Seen) -> Reply {
    let (user, identity) = match &state.access {
        Access::Bearer { user, identity, .. } => (user.clone(), identity.clone()),
        _ => (None, None),
    };
    let is_known = match (seen.method.as_str(), user, identity) {
        ("POST", _, Some(identity)) => seen.body.contains(&format!("refresh_token={identity}")),
        ("POST", _, None) => return Reply::new(404, ""),
        (_, Some((user, password)), _) => seen.headers.get("authorization") == Some(&basic(&user, &password)),
        (_, None, _) => true,
    };
    if !is_known {
        return Reply::error(401, "UNAUTHORIZED", "incorrect username or password");
    }
    state.n_tokens += 1;
    let token = format!("token-{}", state.n_tokens);
    state.tokens.insert(token.clone());
    Reply::new(200, format!(r#"{{"token":"{token}","expires_in":300}}"#))
        .with("Content-Type", "application/json")
}

/// Sends the reply with its fault. Returns whether the connection can go on.
fn send(
    shared: &Shared,
    mut stream: &TcpStream,
    seen: &Seen,
    mut reply: Reply,
    fault: Option<Fault>,
) -> io::Result<bool> {
    let mut n_sent = reply.body.len();
    let (mut is_chunked, mut stalls) = (false, false);
    match fault {
        None | Some(Fault::IgnoreRange) => {}
        Some(Fault::HangUp) => return Ok(false),
        Some(Fault::Status(status, headers, body)) => reply = Reply { status, headers, body },
        Some(Fault::Redirect(to)) => reply = Reply::new(307, "").with("Location", to),
        Some(Fault::ContentType(media_type)) => reply = reply.with("Content-Type", media_type),
        Some(Fault::DigestHeader(digest)) => reply = reply.with("Docker-Content-Digest", digest),
        Some(Fault::Corrupt) => reply.body.iter_mut().take(1).for_each(|byte| *byte = !*byte),
        Some(Fault::Chunked(body)) => (reply.body, is_chunked) = (body, true),
        Some(Fault::TruncateAfter(n)) => n_sent = n,
        Some(Fault::StallAfter(n)) => (n_sent, stalls) = (n, true),
    }
    let is_whole = n_sent >= reply.body.len() || !stalls && n_sent == reply.body.len();
    let mut head = format!("HTTP/1.1 {} Fake\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if is_chunked {
        head.push_str("Transfer-Encoding: chunked\r\n\r\n");
    } else {
        head.push_str(&format!("Content-Length: {}\r\n\r\n", reply.body.len()));
    }
    stream.write_all(head.as_bytes())?;
    if seen.method == "HEAD" {
        return Ok(true);
    }
    if is_chunked {
        stream.write_all(format!("{:x}\r\n", reply.body.len()).as_bytes())?;
        stream.write_all(&reply.body)?;
        stream.write_all(b"\r\n0\r\n\r\n")?;
        return Ok(true);
    }
    stream.write_all(reply.body.get(..n_sent.min(reply.body.len())).unwrap_or_default())?;
    if stalls {
        let state = shared.lock();
        drop(shared.over.wait_while(state, |state| !state.is_over).unwrap_or_else(PoisonError::into_inner));
        return Ok(false);
    }
    Ok(is_whole)
}
