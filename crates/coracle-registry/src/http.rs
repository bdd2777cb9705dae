//! One exchange with a server: the request, its redirects, and what an error answer says.
//!
//! Redirects are followed here and not by the HTTP library: at most five, never from https to http, and with
//! `Authorization` only as long as the origin stays the same (CVE-2020-15157 and its many relatives).

use std::io::{self, Read};
use std::time::Duration;

use coracle_base::{Canceled, Redacted};
use serde::Deserialize;
use ureq::http::{Method, Request, Response, header};
use ureq::{Body, BodyReader};

use crate::agents::Agents;
use crate::error::RegistryError;
use crate::url::{Origin, Url};

/// Redirects of one request.
const REDIRECTS_MAX: usize = 5;
/// Bytes of an error body, and of a token.
pub(crate) const ERROR_BYTES_MAX: u64 = 1 << 20;
/// Characters of a registry's own words that are shown.
const DETAIL_CHARS_MAX: usize = 300;

/// What happened when a connection ends too early, whoever notices it.
pub(crate) const CUT_SHORT: &str = "the connection ended before the answer was complete";

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) struct Ask<'a> {
    pub method: Method,
    pub accept: Option<&'a str>,
    /// First byte wanted, if not the first of all.
    pub offset: u64,
    pub authorization: Option<Redacted<String>>,
    /// A form to post.
    pub form: Option<Redacted<String>>,
}

impl<'a> Ask<'a> {
    pub(crate) fn get(accept: Option<&'a str>) -> Self {
        Self { method: Method::GET, accept, offset: 0, authorization: None, form: None }
    }
}

/// An answer, and who gave it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub origin: Origin,
    pub response: Response<Body>,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(crate) fn host(&self) -> String {
        self.origin.authority()
    }

    /// A header's value, if it is there and is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name).and_then(|value| value.to_str().ok())
    }

    pub(crate) fn length(&self) -> Option<u64> {
        self.header("content-length").and_then(|text| text.trim().parse().ok())
    }

    /// The values of `WWW-Authenticate`.
    pub(crate) fn challenges(&self) -> Vec<String> {
        let all = self.response.headers().get_all(header::WWW_AUTHENTICATE).iter();
        all.filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
    }

    pub(crate) fn protocol(&self, reason: impl Into<String>) -> RegistryError {
        RegistryError::Protocol { host: self.host(), reason: reason.into() }
    }

    pub(crate) fn into_reader(self) -> BodyReader<'static> {
        self.response.into_body().into_reader()
    }

    /// The whole body, if it has at most `limit` bytes.
    pub(crate) fn into_bytes(self, what: &str, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let host = self.host();
        let announced = self.length();
        let too_large = |n: u64| RegistryError::Protocol {
            host: host.clone(),
            reason: format!("{what} has {n} bytes or more; the limit is {limit}"),
        };
        if let Some(n) = announced.filter(|n| *n > limit) {
            return Err(too_large(n));
        }
        let mut bytes = Vec::new();
        let mut reader = self.into_reader().take(limit + 1);
        reader.read_to_end(&mut bytes).map_err(|error| broken(&host, error))?;
        let n = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if n > limit { Err(too_large(n)) } else { Ok(bytes) }
    }

    /// What kind of failure the answer is.
    pub(crate) fn into_failure(self) -> Failure {
        let (host, status) = (self.host(), self.status());
        let after =
            self.header("retry-after").and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
        let challenges = self.challenges();
        // An error's body explains it; if it cannot be read the status has to do.
        let body = self.into_bytes("the error", ERROR_BYTES_MAX).unwrap_or_default();
        let error =
            serde_json::from_slice::<Errors>(&body).ok().and_then(|errors| errors.errors.into_iter().next());
        let (code, message) = match error {
            Some(error) => (error.code, error.message),
            None => (String::new(), String::new()),
        };
        Failure { host, status, after, challenges, code: printable(&code), message: printable(&message) }
    }
}

/// An answer that is a failure, taken apart.
#[derive(Debug)]
pub(crate) struct Failure {
    pub host: String,
    pub status: u16,
    pub after: Option<Duration>,
    pub challenges: Vec<String>,
    /// `MANIFEST_UNKNOWN`, or empty.
    pub code: String,
    pub message: String,
}

impl Failure {
    /// As Docker prints it: `manifest unknown: manifest unknown`.
    pub(crate) fn detail(&self) -> String {
        let code = self.code.to_ascii_lowercase().replace('_', " ");
        match (code.is_empty(), self.message.is_empty()) {
            (false, false) => format!("{code}: {}", self.message),
            (false, true) => code,
            (true, false) => self.message.clone(),
            (true, true) => reason_phrase(self.status),
        }
    }

    pub(crate) fn into_error(self) -> RegistryError {
        let detail = self.detail();
        match self.status {
            429 => RegistryError::RateLimited { host: self.host, detail, after: self.after },
            status => RegistryError::Status { host: self.host, status, detail, after: self.after },
        }
    }
}

/// Error bodies: `{"errors": [{"code": …, "message": …}]}`.
#[derive(Deserialize)]
struct Errors {
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

fn reason_phrase(status: u16) -> String {
    let known = ureq::http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    known.unwrap_or("no reason given").to_ascii_lowercase()
}

/// Text from outside as it may be shown: shortened, on one line, without control characters.
pub(crate) fn printable(text: &str) -> String {
    let shown = text.trim().chars().take(DETAIL_CHARS_MAX);
    shown.map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Makes the request and follows redirects.
pub(crate) fn exchange(agents: &Agents, url: &Url, ask: &Ask<'_>) -> Result<Answer, RegistryError> {
    let mut url = url.clone();
    let mut ask = ask.clone();
    let home = url.origin.clone();
    for _ in 0..=REDIRECTS_MAX {
        let answer = once(agents, &url, &ask)?;
        let is_redirect = matches!(answer.status(), 301 | 302 | 303 | 307 | 308);
        let Some(location) = answer.header("location").filter(|_| is_redirect) else {
            return Ok(answer);
        };
        let next =
            url.join(location).ok_or_else(|| answer.protocol("it redirects to something that is no URL"))?;
        if url.origin.https && !next.origin.https {
            return Err(answer.protocol(format!("it redirects from https to plain http, to {next}")));
        }
        if next.origin.is_inside() && !home.is_inside() && next.origin.host != home.host {
            let is_private = next.origin.address().is_some_and(is_private);
            // A store in the same private network as its registry is usual; the rest is nobody's business.
            if !is_private {
                return Err(
                    answer.protocol(format!("it redirects to an address of this machine or link, {next}"))
                );
            }
        }
        if next.origin != home {
            // Once away, credentials stay away, even if a further redirect leads back.
            ask.authorization = None;
        }
        url = next;
    }
    Err(RegistryError::Protocol {
        host: home.authority(),
        reason: format!("more than {REDIRECTS_MAX} redirects"),
    })
}

fn is_private(address: std::net::IpAddr) -> bool {
    match address {
        std::net::IpAddr::V4(address) => address.is_private(),
        std::net::IpAddr::V6(address) => address.is_unique_local(),
    }
}

/// Makes the request once.
pub(crate) fn once(agents: &Agents, url: &Url, ask: &Ask<'_>) -> Result<Answer, RegistryError> {
    agents.cancel().check()?;
    let agent = agents.get(&url.origin)?;
    let host = url.origin.authority();
    let protocol =
        |error: ureq::http::Error| RegistryError::Protocol { host: host.clone(), reason: error.to_string() };
    let mut request = Request::builder().method(ask.method.clone()).uri(url.full());
    if let Some(accept) = ask.accept {
        request = request.header(header::ACCEPT, accept);
    }
    if ask.offset > 0 {
        request = request.header(header::RANGE, format!("bytes={}-", ask.offset));
    }
    if let Some(authorization) = &ask.authorization {
        request = request.header(header::AUTHORIZATION, authorization.reveal());
    }
    let response = match &ask.form {
        Some(form) => {
            request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
            agent.run(request.body(form.reveal().as_str()).map_err(protocol)?)
        }
        None => agent.run(request.body(()).map_err(protocol)?),
    };
    match response {
        Ok(response) => Ok(Answer { origin: url.origin.clone(), response }),
        Err(error) => Err(failed(&host, error)),
    }
}

/// What an error while reading a body is.
pub(crate) fn broken(host: &str, error: io::Error) -> RegistryError {
    failed(host, ureq::Error::from(error))
}

/// What an error of the HTTP library is.
fn failed(host: &str, error: ureq::Error) -> RegistryError {
    let host = host.to_owned();
    let connect = |source: io::Error| RegistryError::Connect { host: host.clone(), source };
    match error {
        ureq::Error::Io(error) => {
            let inner = error.get_ref();
            if inner.is_some_and(|inner| inner.is::<Canceled>()) {
                RegistryError::Canceled
            } else if inner.is_some_and(|inner| inner.is::<rustls::Error>()) {
                RegistryError::Tls { host, source: Box::new(error) }
            } else if error.kind() == io::ErrorKind::UnexpectedEof {
                connect(io::Error::new(error.kind(), CUT_SHORT))
            } else {
                connect(error)
            }
        }
        ureq::Error::Timeout(what) => {
            let text = match what {
                ureq::Timeout::Resolve => "the name server did not answer in time",
                ureq::Timeout::Connect => "the connection was not established in time",
                ureq::Timeout::PerRead => "no data came for too long",
                _ => "no answer came in time",
            };
            connect(io::Error::new(io::ErrorKind::TimedOut, text))
        }
        ureq::Error::HostNotFound => connect(io::Error::new(io::ErrorKind::NotFound, "no such host")),
        ureq::Error::Rustls(source) => RegistryError::Tls { host, source: Box::new(source) },
        ureq::Error::Tls(source) => RegistryError::Tls { host, source: source.into() },
        ureq::Error::ConnectProxyFailed(reason) => {
            connect(io::Error::other(format!("the proxy refused: {}", printable(&reason))))
        }
        other => RegistryError::Protocol { host, reason: printable(&other.to_string()) },
    }
}
