//! A registry inside the test, which serves an OCI layout and misbehaves on demand.
//!
//! It speaks just enough of distribution-spec 1.1 to be pulled from (end-1 to end-3) and answers one request
//! per connection. A test changes its behaviour with a closure that sees each request first.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use xtask::image::{Compression, Layer, Layout};
use xtask::scratch;

/// A request as the server read it.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With its query.
    pub(crate) path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(&name.to_ascii_lowercase()).map(String::as_str)
    }

    pub(crate) fn is_blob(&self) -> bool {
        self.path.contains("/blobs/")
    }

    pub(crate) fn is_manifest(&self) -> bool {
        self.path.contains("/manifests/")
    }
}

/// What the server answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Close the connection after so many bytes of the body, though its length was announced in full.
    pub(crate) cut_after: Option<usize>,
}

impl Response {
    pub(crate) fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// An error in the registry's JSON.
    pub(crate) fn error(status: u16, code: &str) -> Self {
        let body = json!({"errors": [{"code": code, "message": code.to_lowercase()}]});
        Self { status, body: body.to_string().into_bytes(), ..Self::default() }
            .with("Content-Type", "application/json")
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

type Behaviour = dyn Fn(&Request, &Response) -> Option<Response> + Send + Sync;

struct State {
    layout: Layout,
    /// Digests of manifests by `name:tag`.
    tags: Mutex<BTreeMap<String, String>>,
    requests: Mutex<Vec<Request>>,
    behaviour: Mutex<Option<Arc<Behaviour>>>,
}

/// A running server; it ends, and its files go, when it is dropped.
pub(crate) struct Server {
    address: SocketAddr,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts an empty registry on a free port of loopback, in the calling thread's network namespace.
    pub(crate) fn start() -> Self {
        let dir = scratch::unique(&scratch::target_dir().join("registry"), "it").unwrap();
        let state = Arc::new(State {
            layout: Layout::open(dir).unwrap(),
            tags: Mutex::default(),
            requests: Mutex::default(),
            behaviour: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let for_thread = Arc::clone(&state);
        let thread = std::thread::spawn(move || serve(&listener, &for_thread));
        Self { address, state, thread: Some(thread) }
    }

    /// `127.0.0.1:<port>`.
    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// The layout that is served.
    pub(crate) fn layout(&self) -> &Layout {
        &self.state.layout
    }

    /// Serves an image of another layout, by hard links to its blobs.
    pub(crate) fn add_from(&self, from: &Layout, name: &str, tag: &str) {
        let digest = from.find(name).unwrap().unwrap();
        let manifest: Value = serde_json::from_slice(&fs::read(from.blob(&digest)).unwrap()).unwrap();
        let blobs = manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]);
        let mut digests: Vec<&str> = blobs.map(|b| b["digest"].as_str().unwrap()).collect();
        digests.push(&digest);
        for blob in digests {
            if !self.layout().blob(blob).exists() {
                fs::hard_link(from.blob(blob), self.layout().blob(blob)).unwrap();
            }
        }
        self.tag(tag, &digest);
    }

    /// Gives a manifest a name.
    pub(crate) fn tag(&self, tag: &str, digest: &str) {
        self.state.tags.lock().unwrap().insert(tag.to_owned(), digest.to_owned());
    }

    /// Serves an image made of these archives, and returns its reference.
    pub(crate) fn add(&self, tag: &str, config: &Value, archives: &[Vec<u8>]) -> String {
        let layers: Vec<Layer> = archives
            .iter()
            .map(|a| self.layout().add_layer(&mut a.as_slice(), Compression::Gzip).unwrap())
            .collect();
        self.add_layers(tag, config, &layers)
    }

    /// Serves an image made of these layers, and returns its reference.
    pub(crate) fn add_layers(&self, tag: &str, config: &Value, layers: &[Layer]) -> String {
        let digest = self.layout().add_image(tag, config, layers).unwrap();
        self.tag(tag, &digest);
        format!("{}/{tag}", self.address)
    }

    /// Changes how requests are answered: `behaviour` sees each with the answer it would get, and may give
    /// another.
    pub(crate) fn behave(
        &self,
        behaviour: impl Fn(&Request, &Response) -> Option<Response> + Send + Sync + 'static,
    ) {
        *self.state.behaviour.lock().unwrap() = Some(Arc::new(behaviour));
    }

    /// Answers as it should again.
    pub(crate) fn behave_well(&self) {
        *self.state.behaviour.lock().unwrap() = None;
    }

    /// The requests so far.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.state.requests.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The accept loop ends at a connection that says so.
        if let Ok(mut stream) = TcpStream::connect(self.address) {
            stream.write_all(b"STOP / HTTP/1.1\r\n\r\n").ok();
        }
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
        fs::remove_dir_all(self.layout().dir()).ok();
    }
}

fn serve(listener: &TcpListener, state: &Arc<State>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let Some(request) = read_request(&stream) else { continue };
        if request.method == "STOP" {
            return;
        }
        let state = Arc::clone(state);
        std::thread::spawn(move || answer(stream, &request, &state));
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    Some(Request { method, path, headers })
}

fn answer(mut stream: TcpStream, request: &Request, state: &State) {
    state.requests.lock().unwrap().push(request.clone());
    let proper = proper_response(request, state);
    let behaviour = state.behaviour.lock().unwrap().clone();
    let response = behaviour.and_then(|b| b(request, &proper)).unwrap_or(proper);
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", response.status);
    for (name, value) in &response.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !response.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("content-length")) {
        head.push_str(&format!("Content-Length: {}\r\n", response.body.len()));
    }
    head.push_str("\r\n");
    let mut body = response.body.as_slice();
    if let Some(cut) = response.cut_after {
        body = &body[..cut.min(body.len())];
    }
    if request.method == "HEAD" {
        body = &[];
    }
    // A client may hang up at any time.
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok();
    stream.shutdown(Shutdown::Write).ok();
    // Closing with unread input would reset the connection under the client's feet.
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).ok();
    stream.read_exact(&mut [0; 1]).ok();
}

fn proper_response(request: &Request, state: &State) -> Response {
    let path = request.path.split('?').next().unwrap_or_default();
    if path == "/v2/" {
        return Response::status(200);
    }
    let Some(rest) = path.strip_prefix("/v2/") else { return Response::status(404) };
    if let Some((name, reference)) = rest.split_once("/manifests/") {
        let digest = if reference.starts_with("sha256:") {
            Some(reference.to_owned())
        } else {
            state.tags.lock().unwrap().get(&format!("{name}:{reference}")).cloned()
        };
        let Some(bytes) = digest.as_ref().and_then(|d| fs::read(state.layout.blob(d)).ok()) else {
            return Response::error(404, "MANIFEST_UNKNOWN");
        };
        let document: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let media =
            document["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned();
        return Response { status: 200, body: bytes, ..Response::default() }
            .with("Content-Type", &media)
            .with("Docker-Content-Digest", &digest.unwrap_or_default());
    }
    let Some((_, digest)) = rest.split_once("/blobs/") else { return Response::status(404) };
    match fs::read(state.layout.blob(digest)) {
        Ok(bytes) => ranged(request, bytes),
        Err(_) => Response::error(404, "BLOB_UNKNOWN"),
    }
}

/// The whole blob, or its end where the client asks for it: `Range: bytes=N-`.
fn ranged(request: &Request, bytes: Vec<u8>) -> Response {
    let total = bytes.len();
    let from = request
        .header("range")
        .and_then(|r| r.strip_prefix("bytes="))
        .and_then(|r| r.split('-').next()?.parse::<usize>().ok());
    match from {
        Some(from) if from < total => {
            let range = format!("bytes {from}-{}/{total}", total - 1);
            Response { status: 206, body: bytes[from..].to_vec(), ..Response::default() }
                .with("Content-Range", &range)
        }
        Some(_) => Response::status(416),
        None => Response { status: 200, body: bytes, ..Response::default() },
    }
}
