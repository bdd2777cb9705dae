//! The client: manifests, tags and blobs of repositories.
//!
//! One request is: mirrors in order, then the registry; for each the schemes that are allowed; a 401 is answered
//! once; failures that pass are retried with back-off. Bytes are compared with their digest before anybody else
//! sees them. Source: OCI distribution-spec 1.1, end-1 to end-3 and end-8.

use coracle_base::progress::ProgressEvent;
use coracle_base::{Cancel, Progress};
use coracle_oci::{
    Algorithm, Descriptor, Digest, Document, OciError, Reference, Repository, manifest, media,
};
use ureq::http::Method;

use crate::agents::Agents;
use crate::auth::{Auth, Purpose};
use crate::blob::Blob;
use crate::config::Config;
use crate::endpoint::{Endpoint, Endpoints};
use crate::error::RegistryError;
use crate::http::{Answer, Ask, Failure};
use crate::url::{Origin, escape};
use crate::wait;

/// Tries of one request in all.
pub(crate) const TRIES_MAX: u32 = 6;
/// All manifest types in one header line: some servers read only the first of several.
const ACCEPT_MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";
/// Tags of one repository that are listed.
const TAGS_MAX: usize = 100_000;
const TAGS_BYTES_MAX: u64 = 4 << 20;

/// A client for one operation. Cheap to make; shares connections and tokens between its threads.
#[derive(Debug)]
pub struct Client {
    pub(crate) agents: Agents,
    auth: Auth,
    endpoints: Endpoints,
}

/// A manifest or an index as a registry gave it. Its digest is that of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The type the registry gave it, without parameters; may be empty or generic.
    pub media_type: String,
    /// The digest of the bytes.
    pub digest: Digest,
}

impl Fetched {
    /// Understands the bytes.
    ///
    /// # Errors
    /// As [`Document::parse`].
    pub fn document(&self) -> Result<Document, OciError> {
        Document::parse(&self.bytes, &self.media_type)
    }
}

/// What a reference stands for at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The digest of the manifest.
    pub digest: Digest,
    /// Its type, without parameters.
    pub media_type: String,
    /// Its size in bytes, if the registry said it.
    pub size: Option<u64>,
}

/// One request below `/v2/`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call<'a> {
    pub method: &'a Method,
    pub path: &'a str,
    pub accept: Option<&'static str>,
    pub offset: u64,
    /// The path of the repository whose rights are needed; empty for none.
    pub repository: &'a str,
}

impl<'a> Call<'a> {
    fn purpose(&self, endpoint: &'a Endpoint, origin: &'a Origin) -> Purpose<'a> {
        Purpose { origin, host: &endpoint.host, repository: self.repository }
    }
}

impl Client {
    /// A client with these settings that stops when `cancel` is set.
    #[must_use]
    pub fn new(config: &Config, cancel: &Cancel) -> Self {
        Self {
            agents: Agents::new(config.clone(), cancel.clone()),
            auth: Auth::default(),
            endpoints: Endpoints::default(),
        }
    }

    /// Returns the manifest or index under a reference.
    ///
    /// # Errors
    /// [`RegistryError`]; `NotFound` and `AccessDenied` carry Docker's words.
    pub fn manifest(&self, reference: &Reference, progress: &dyn Progress) -> Result<Fetched, RegistryError> {
        let short = reference.familiar();
        self.retrying(&short, progress, || {
            let answer = self.ask_manifest(&Method::GET, reference)?;
            let announced = answer.header("docker-content-digest").map(Digest::parse);
            let media_type = media::essence(answer.header("content-type").unwrap_or_default());
            let host = answer.host();
            let limit = u64::try_from(manifest::MANIFEST_BYTES_MAX).unwrap_or(u64::MAX);
            let bytes = answer.into_bytes("the manifest", limit)?;
            // What was asked for counts most; then what the registry announced, so that a change on the way shows.
            let expected = match (reference.digest(), announced) {
                (Some(digest), _) => Some(digest.clone()),
                (None, Some(Ok(digest))) => Some(digest),
                (None, Some(Err(_))) => {
                    let reason = "its Docker-Content-Digest is not a digest".to_owned();
                    return Err(RegistryError::Protocol { host, reason });
                }
                (None, None) => None,
            };
            let algorithm = expected.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
            let digest = digest_of(algorithm, &bytes);
            match expected {
                Some(expected) if expected != digest => {
                    let subject = format!("manifest {short}");
                    Err(RegistryError::WrongDigest { subject, expected, actual: digest })
                }
                _ => Ok(Fetched { bytes, media_type, digest }),
            }
        })
    }

    /// Returns the digest a reference stands for, without the manifest itself (which registries count as a pull).
    ///
    /// # Errors
    /// [`RegistryError`], as [`Client::manifest`].
    pub fn resolve(&self, reference: &Reference, progress: &dyn Progress) -> Result<Resolved, RegistryError> {
        let resolved = self.retrying(&reference.familiar(), progress, || {
            let answer = self.ask_manifest(&Method::HEAD, reference)?;
            let media_type = media::essence(answer.header("content-type").unwrap_or_default());
            let digest = match (reference.digest(), answer.header("docker-content-digest")) {
                (Some(digest), _) => Some(digest.clone()),
                (None, text) => text.and_then(|text| Digest::parse(text).ok()),
            };
            Ok(digest.map(|digest| Resolved { digest, media_type, size: answer.length() }))
        })?;
        if let Some(resolved) = resolved {
            return Ok(resolved);
        }
        // The header is not obligatory; the bytes tell.
        let fetched = self.manifest(reference, progress)?;
        let size = u64::try_from(fetched.bytes.len()).ok();
        Ok(Resolved { digest: fetched.digest, media_type: fetched.media_type, size })
    }

    /// A blob, to be opened for reading. Makes no request yet.
    #[must_use]
    pub fn blob<'a>(
        &'a self,
        repository: &'a Repository,
        descriptor: &'a Descriptor,
        progress: &'a dyn Progress,
    ) -> Blob<'a> {
        Blob { client: self, repository, descriptor, progress }
    }

    /// Returns all tags of a repository, in the registry's order.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn tags(
        &self,
        repository: &Repository,
        progress: &dyn Progress,
    ) -> Result<Vec<String>, RegistryError> {
        #[derive(serde::Deserialize)]
        struct Page {
            tags: Option<Vec<String>>,
        }
        let short = repository.familiar();
        let mut tags: Vec<String> = Vec::new();
        let mut path = format!("{}/tags/list", repository.path());
        let first = path.clone();
        loop {
            let page = self.retrying(&short, progress, || {
                let call = Call {
                    method: &Method::GET,
                    path: &path,
                    accept: None,
                    offset: 0,
                    repository: repository.path(),
                };
                let answer = self.ask_repository(repository, &call)?;
                let failed = |failure: Failure| match failure.status {
                    404 => {
                        let message = format!("repository {short} not found: {}", failure.detail());
                        RegistryError::NotFound { message }
                    }
                    _ => self.denied(failure, repository),
                };
                let answer = expect(answer, &[200], failed)?;
                let host = answer.host();
                // Only the query of the next page is taken over; the rest of its URL is ours.
                let next = answer.header("link").and_then(next_query).map(|query| format!("{first}?{query}"));
                let bytes = answer.into_bytes("the list of tags", TAGS_BYTES_MAX)?;
                let page: Page = serde_json::from_slice(&bytes).map_err(|error| RegistryError::Protocol {
                    host,
                    reason: format!("its list of tags is not JSON: {error}"),
                })?;
                Ok((page.tags.unwrap_or_default(), next))
            })?;
            let is_empty = page.0.is_empty();
            tags.extend(page.0);
            match page.1 {
                Some(next) if !is_empty && next != path && tags.len() < TAGS_MAX => path = next,
                _ => return Ok(tags),
            }
        }
    }

    /// Checks that a registry is there and takes the credentials that are configured for it: what `login` needs.
    ///
    /// # Errors
    /// [`RegistryError::Unauthorized`] if it does not, others if it is not there.
    pub fn ping(&self, host: &str) -> Result<(), RegistryError> {
        let endpoint = self.endpoints.home(&self.agents, host)?;
        let call = Call { method: &Method::GET, path: "", accept: None, offset: 0, repository: "" };
        let answer = self.ask_endpoint(&endpoint, &call)?;
        expect(answer, &[200], |failure| match failure.status {
            401 | 403 => RegistryError::Unauthorized { host: host.to_owned(), detail: failure.detail() },
            _ => failure.into_error(),
        })?;
        Ok(())
    }

    fn ask_manifest(&self, method: &Method, reference: &Reference) -> Result<Answer, RegistryError> {
        let repository = reference.repository();
        let path = format!("{}/manifests/{}", repository.path(), reference.identifier());
        let accept = Some(ACCEPT_MANIFESTS);
        let call = Call { method, path: &path, accept, offset: 0, repository: repository.path() };
        let answer = self.ask_repository(repository, &call)?;
        expect(answer, &[200], |failure| match failure.status {
            404 => {
                // HEAD has no body that says more.
                let unknown = "manifest unknown: manifest unknown".to_owned();
                let detail = if failure.code.is_empty() { unknown } else { failure.detail() };
                let message = format!("manifest for {} not found: {detail}", reference.familiar());
                RegistryError::NotFound { message }
            }
            _ => self.denied(failure, repository),
        })
    }

    /// What a failure means for somebody who wants to pull.
    pub(crate) fn denied(&self, failure: Failure, repository: &Repository) -> RegistryError {
        let host = repository.host();
        match failure.status {
            401 if self.auth.is_refused(&self.agents, host, &failure.challenges) => {
                RegistryError::Unauthorized { host: host.to_owned(), detail: failure.detail() }
            }
            401 | 403 => {
                let words = if failure.code.is_empty() {
                    "denied: requested access to the resource is denied".to_owned()
                } else {
                    failure.detail()
                };
                RegistryError::AccessDenied {
                    repository: repository.familiar(),
                    detail: words,
                    host: host.to_owned(),
                }
            }
            _ => failure.into_error(),
        }
    }

    /// Asks mirrors and then the registry. A mirror that fails in whatever way is passed over.
    pub(crate) fn ask_repository(
        &self,
        repository: &Repository,
        call: &Call<'_>,
    ) -> Result<Answer, RegistryError> {
        let endpoints = self.endpoints.of(&self.agents, repository)?;
        let Some((home, mirrors)) = endpoints.split_last() else {
            return Err(RegistryError::Setup {
                subject: repository.to_string(),
                reason: "no endpoint".to_owned(),
            });
        };
        for mirror in mirrors {
            match self.ask_endpoint(mirror, call) {
                Ok(answer) if (200..300).contains(&answer.status()) => return Ok(answer),
                Err(RegistryError::Canceled) => return Err(RegistryError::Canceled),
                Ok(_) | Err(_) => {}
            }
        }
        self.ask_endpoint(home, call)
    }

    /// Asks one endpoint and answers its challenge, once.
    fn ask_endpoint(&self, endpoint: &Endpoint, call: &Call<'_>) -> Result<Answer, RegistryError> {
        let mut is_challenged = false;
        loop {
            let mut ask = |origin: &Origin| {
                let authorization = self.auth.header(&self.agents, call.purpose(endpoint, origin))?;
                let method = call.method.clone();
                Ok(Ask { method, offset: call.offset, authorization, ..Ask::get(call.accept) })
            };
            let (origin, answer) = self.endpoints.ask(&self.agents, endpoint, call.path, &mut ask)?;
            // A 401 from where a redirect led to is not for us to answer.
            if answer.status() != 401 || is_challenged || answer.origin != origin {
                return Ok(answer);
            }
            is_challenged = true;
            if !self.auth.learn(&self.agents, call.purpose(endpoint, &origin), &answer.challenges())? {
                return Ok(answer);
            }
        }
    }

    /// Runs `work` again after failures that pass.
    fn retrying<T>(
        &self,
        id: &str,
        progress: &dyn Progress,
        mut work: impl FnMut() -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let mut n = 0;
        loop {
            match work() {
                Err(error) if n + 1 < TRIES_MAX && error.retry().is_some() => {
                    self.wait_before_retry(&error, n, id, progress)?;
                    n += 1;
                }
                done => return done,
            }
        }
    }

    /// Waits as long as the registry asks for, or backs off.
    pub(crate) fn wait_before_retry(
        &self,
        error: &RegistryError,
        n: u32,
        id: &str,
        progress: &dyn Progress,
    ) -> Result<(), RegistryError> {
        let base = self.agents.config().timeouts.retry;
        let how_long = error.retry().flatten().unwrap_or_else(|| wait::backoff(base, n));
        wait::wait(how_long, self.agents.cancel(), |seconds| {
            let status = format!("Retrying in {seconds} second{}", if seconds == 1 { "" } else { "s" });
            progress.event(ProgressEvent::Status { id, status: &status });
        })?;
        Ok(())
    }
}

/// Lets answers with these statuses pass and takes the others for failures.
pub(crate) fn expect(
    answer: Answer,
    statuses: &[u16],
    failed: impl FnOnce(Failure) -> RegistryError,
) -> Result<Answer, RegistryError> {
    if statuses.contains(&answer.status()) { Ok(answer) } else { Err(failed(answer.into_failure())) }
}

/// The digest of some bytes.
#[must_use]
pub fn digest_of(algorithm: Algorithm, bytes: &[u8]) -> Digest {
    use ring::digest::{SHA256, SHA512, digest};
    match algorithm {
        Algorithm::Sha256 => {
            let mut hash = [0; 32];
            hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
            Digest::from_sha256(&hash)
        }
        Algorithm::Sha512 => {
            let mut hash = [0; 64];
            hash.copy_from_slice(digest(&SHA512, bytes).as_ref());
            Digest::from_sha512(&hash)
        }
    }
}

/// The query of the page that follows: `</v2/a/tags/list?last=x&n=100>; rel="next"`, rebuilt from `last` and `n`.
fn next_query(link: &str) -> Option<String> {
    let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
    if !parameters.to_ascii_lowercase().contains("next") {
        return None;
    }
    let (_, query) = target.split_once('?')?;
    let is_safe = |text: &str| text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'#' | b'?'));
    is_safe(query).then(|| query.to_owned()).or_else(|| Some(escape(query)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_manifest_types_are_accepted_in_one_line() {
        assert_eq!(ACCEPT_MANIFESTS, media::MANIFESTS.join(", "));
    }

    #[test]
    fn the_next_page_is_found() {
        let next = r#"</v2/a/tags/list?last=b&n=2>; rel="next""#;
        assert_eq!(next_query(next).as_deref(), Some("last=b&n=2"));
        assert_eq!(next_query(r#"</v2/a/tags/list?last=b>; rel="prev""#), None);
        assert_eq!(next_query("nonsense"), None);
    }
}
