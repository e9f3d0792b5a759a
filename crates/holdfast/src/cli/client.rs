//! A client of the API: one connection per request, over the agent's unix socket
//! or over TLS. Every step has a deadline.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_api::ErrorBody;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::args::Connection;
use crate::agent::Duplex;
use crate::config::Config;
use crate::identity::ANY_NODE;

/// How long connecting may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long an answer may take. Longer than the agent looks for a coordinator
/// and than it looks at images.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);
/// How long a file may take on its way.
const BODY_WITHIN: Duration = Duration::from_secs(7 * 24 * 3600);
/// The largest answer that is read, in bytes.
const LARGEST_ANSWER: usize = 64 << 20;
/// The longest line of a stream, in bytes.
const LONGEST_LINE: usize = 1 << 20;
/// A stream that shows no sign of life for so long is dead: the agent sends one
/// every ten seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// The body of a request: all of it at once, or what comes.
type Sent = BoxBody<Bytes, std::io::Error>;

/// A body that is all there.
pub fn whole(body: Bytes) -> Sent {
    Full::new(body).map_err(|never| match never {}).boxed()
}

/// Why a request brought no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The options make no sense together.
    #[error("{0}")]
    Options(String),
    /// Nobody answers.
    #[error("the agent at {agent} cannot be reached ({why}): {what_to_do}")]
    Unreachable {
        /// Which agent.
        agent: String,
        /// What happened.
        why: String,
        /// What to do about it.
        what_to_do: &'static str,
    },
    /// The connection broke, or no answer came in time.
    #[error(
        "the agent at {agent} gave no answer ({why}): what was asked may or may not have been done; look before you repeat it"
    )]
    Lost {
        /// Which agent.
        agent: String,
        /// What happened.
        why: String,
    },
    /// It answered with an error.
    #[error("{message}")]
    Refused {
        /// For programs.
        code: String,
        /// For people.
        message: String,
    },
    /// It answered something else.
    #[error("the agent at {agent} answered something unexpected ({why}): is it of the same version as this program?")]
    Strange {
        /// Which agent.
        agent: String,
        /// What happened.
        why: String,
    },
}

/// Where the agent is.
#[derive(Clone)]
enum Target {
    Unix(PathBuf),
    Tls { host: String, port: u16, config: Arc<ClientConfig>, token: String },
}

/// A client of one agent.
#[derive(Clone)]
pub struct Client {
    target: Target,
}

impl Client {
    /// For the agent that the options name.
    ///
    /// # Errors
    /// [`ClientError::Options`] when something is missing or unreadable.
    pub fn new(options: &Connection) -> Result<Client, ClientError> {
        let Some(server) = &options.server else {
            return Ok(Client { target: Target::Unix(options.socket.clone()) });
        };
        let (host, port) = address(server)?;
        let missing = |what: &str| ClientError::Options(format!("--server needs {what}"));
        let token = options.token.clone().ok_or_else(|| {
            missing("--token or HOLDFAST_TOKEN: make a token with `holdfast token create NAME` on a node")
        })?;
        let ca = options
            .ca
            .as_ref()
            .ok_or_else(|| missing("--ca FILE or HOLDFAST_CA: get the file with `holdfast cluster ca` on a node"))?;
        let unreadable = |why: String| ClientError::Options(format!("{} cannot be used: {why}", ca.display()));
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca).map_err(|error| unreadable(error.to_string()))? {
            let certificate = certificate.map_err(|error| unreadable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unreadable(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(unreadable("there is no certificate in it".into()));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| ClientError::Options(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Client { target: Target::Tls { host, port, config: Arc::new(config), token } })
    }

    /// Whether the agent is on this host, so that both see the same files.
    pub fn is_local(&self) -> bool {
        matches!(self.target, Target::Unix(_))
    }

    /// What is asked, for messages.
    fn agent(&self) -> String {
        match &self.target {
            Target::Unix(path) => path.display().to_string(),
            Target::Tls { host, port, .. } => format!("https://{host}:{port}"),
        }
    }

    fn unreachable(&self, why: impl ToString) -> ClientError {
        let what_to_do = match &self.target {
            Target::Unix(_) => {
                "is it running (`systemctl status holdfast`), and may you use its socket (root or group holdfast)?"
            }
            Target::Tls { .. } => "is the node up, is the address right, and is --ca the certificate of its cluster?",
        };
        ClientError::Unreachable { agent: self.agent(), why: why.to_string(), what_to_do }
    }

    async fn connect(&self) -> Result<Box<dyn Duplex>, ClientError> {
        let connecting = async {
            Ok::<Box<dyn Duplex>, std::io::Error>(match &self.target {
                Target::Unix(path) => Box::new(UnixStream::connect(path).await?),
                Target::Tls { host, port, config, .. } => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    // Every node's certificate carries this name beside its own:
                    // addresses of nodes change, and any node of the cluster is
                    // as good as another.
                    let name = ServerName::try_from(ANY_NODE).map_err(std::io::Error::other)?;
                    Box::new(TlsConnector::from(Arc::clone(config)).connect(name, stream).await?)
                }
            })
        };
        match timeout(CONNECT_WITHIN, connecting).await {
            Ok(connected) => connected.map_err(|error| self.unreachable(error)),
            Err(_) => Err(self.unreachable(format!("no connection within {} s", CONNECT_WITHIN.as_secs()))),
        }
    }

    /// Sends a request and returns the head of a successful answer.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Sent,
        headers: &[(header::HeaderName, String)],
        deadline: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        // A question that was not answered changed nothing.
        let asks = method == Method::GET;
        let lost = |why: String| match asks {
            true => self.unreachable(why),
            false => ClientError::Lost { agent: self.agent(), why },
        };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| lost(error.to_string()))?;
        // Ends when the answer is read or dropped.
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "holdfast")
            .header(header::CONTENT_TYPE, "application/json");
        if let Target::Tls { token, .. } = &self.target {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request
            .body(body)
            .map_err(|error| ClientError::Options(format!("the request cannot be written: {error}")))?;
        let answer = match timeout(deadline, sender.send_request(request)).await {
            Ok(answer) => answer.map_err(|error| lost(error.to_string()))?,
            Err(_) => return Err(lost(format!("it took longer than {} s", deadline.as_secs()))),
        };
        if answer.status().is_success() || answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(answer);
        }
        let status = answer.status();
        let body = self.read(answer).await?;
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error }) => Err(ClientError::Refused { code: error.code, message: error.message }),
            Err(_) => Err(ClientError::Strange { agent: self.agent(), why: format!("status {status}") }),
        }
    }

    async fn read(&self, answer: Response<Incoming>) -> Result<Bytes, ClientError> {
        let lost = |why: String| ClientError::Lost { agent: self.agent(), why };
        let body = Limited::new(answer.into_body(), LARGEST_ANSWER).collect();
        match timeout(ANSWER_WITHIN, body).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) => Err(lost(error.to_string())),
            Err(_) => Err(lost(format!("it took longer than {} s", ANSWER_WITHIN.as_secs()))),
        }
    }

    async fn exchange<A: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<A, ClientError> {
        let answer = self.send(method, path, whole(body), &[], ANSWER_WITHIN).await?;
        let body = self.read(answer).await?;
        // An answer without a body (204) reads as `null`.
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body)
            .map_err(|error| ClientError::Strange { agent: self.agent(), why: error.to_string() })
    }

    /// Reads what is at `path`.
    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        self.exchange(Method::GET, path, Bytes::new()).await
    }

    /// Deletes what is at `path`; the answer may be a job.
    pub async fn delete<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        self.exchange(Method::DELETE, path, Bytes::new()).await
    }

    /// Sends `request` to `path`.
    pub async fn send_json<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        request: &impl Serialize,
    ) -> Result<A, ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| ClientError::Options(error.to_string()))?;
        self.exchange(method, path, body.into()).await
    }

    /// Posts `request` to `path`.
    pub async fn post<A: DeserializeOwned>(&self, path: &str, request: &impl Serialize) -> Result<A, ClientError> {
        self.send_json(Method::POST, path, request).await
    }

    /// Puts a body of so many bytes to `path`, however long that takes.
    pub async fn put_body(&self, path: &str, bytes: u64, body: Sent) -> Result<(), ClientError> {
        let headers = [(header::CONTENT_LENGTH, bytes.to_string())];
        self.send(Method::PUT, path, body, &headers, BODY_WITHIN).await.map(drop)
    }

    /// Opens what is at `path`: its length, if that is known, and its bytes as they come.
    pub async fn get_body(&self, path: &str) -> Result<(u64, Incoming), ClientError> {
        let answer = self.send(Method::GET, path, whole(Bytes::new()), &[], ANSWER_WITHIN).await?;
        let length = answer.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        let strange = || ClientError::Strange { agent: self.agent(), why: "a file without a length".into() };
        Ok((length.ok_or_else(strange)?, answer.into_body()))
    }

    /// Opens the stream of bytes at `path`.
    pub async fn upgrade(&self, path: &str, protocol: &str) -> Result<impl Duplex + use<>, ClientError> {
        let headers = [(header::CONNECTION, "upgrade".to_owned()), (header::UPGRADE, protocol.to_owned())];
        let answer = self.send(Method::GET, path, whole(Bytes::new()), &headers, ANSWER_WITHIN).await?;
        let lost = |why: String| ClientError::Lost { agent: self.agent(), why };
        let upgraded = timeout(CONNECT_WITHIN, hyper::upgrade::on(answer)).await;
        match upgraded {
            Ok(Ok(upgraded)) => Ok(TokioIo::new(upgraded)),
            Ok(Err(error)) => Err(lost(error.to_string())),
            Err(_) => Err(lost("the connection did not become a stream".into())),
        }
    }

    /// Opens the stream of server-sent events at `path`, after the event `last`.
    pub async fn events(&self, path: &str, last: u64) -> Result<Events, ClientError> {
        let headers = [
            (header::ACCEPT, "text/event-stream".to_owned()),
            (header::HeaderName::from_static("last-event-id"), last.to_string()),
        ];
        let answer = self.send(Method::GET, path, whole(Bytes::new()), &headers, ANSWER_WITHIN).await?;
        Ok(Events { body: answer.into_body(), lines: Lines::default() })
    }
}

/// Reads `https://HOST[:PORT]`.
fn address(server: &str) -> Result<(String, u16), ClientError> {
    let bad = || {
        ClientError::Options(format!(
            "--server {server:?} is no address: write https://ADDRESS or https://ADDRESS:PORT"
        ))
    };
    let uri: hyper::Uri = server.parse().map_err(|_| bad())?;
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(bad)?;
    if uri.scheme_str() != Some("https") || !matches!(uri.path(), "" | "/") {
        return Err(bad());
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.into(), uri.port_u16().unwrap_or(Config::default().port)))
}

/// A stream of server-sent events.
pub struct Events {
    body: Incoming,
    lines: Lines,
}

impl Events {
    /// The data of the next event; `None` when the stream ended or showed no
    /// sign of life.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.lines.event() {
                return Some(data);
            }
            let frame = timeout(SILENCE, self.body.frame()).await.ok()??.ok()?;
            if let Ok(bytes) = frame.into_data() {
                self.lines.push(&bytes)?;
            }
        }
    }
}

/// Cuts a stream of server-sent events into the data of its events, as far as
/// our agents use the format: `\n` ends lines, data has one line.
#[derive(Default)]
struct Lines {
    unread: Vec<u8>,
}

impl Lines {
    /// `None` when a line is longer than any that an agent sends.
    fn push(&mut self, bytes: &[u8]) -> Option<()> {
        self.unread.extend_from_slice(bytes);
        (self.unread.len() <= LONGEST_LINE).then_some(())
    }

    fn event(&mut self) -> Option<String> {
        loop {
            let end = self.unread.iter().position(|byte| *byte == b'\n')?;
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(data) = line.trim_end().strip_prefix("data:") {
                return Some(data.trim_start().to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_a_port() {
        let port = Config::default().port;
        assert_eq!(address("https://n1").unwrap(), ("n1".into(), port));
        assert_eq!(address("https://10.0.0.1:99/").unwrap(), ("10.0.0.1".into(), 99));
        assert_eq!(address("https://[fd00::1]:99").unwrap(), ("fd00::1".into(), 99));
        for text in ["n1", "http://n1", "https://", "https://n1/api", "ftp://n1"] {
            assert!(address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn events_are_cut_out_wherever_the_stream_is_broken() {
        let stream = b":\n\nevent: event\nid: 3\ndata: {\"a\":1}\n\nevent: event\nid: 4\ndata: {\"a\":2}\n\n";
        for size in 1..stream.len() {
            let mut lines = Lines::default();
            let mut found = Vec::new();
            for part in stream.chunks(size) {
                lines.push(part).unwrap();
                while let Some(event) = lines.event() {
                    found.push(event);
                }
            }
            assert_eq!(found, ["{\"a\":1}", "{\"a\":2}"], "in parts of {size}");
        }
    }

    #[test]
    fn a_line_without_end_is_given_up() {
        let mut lines = Lines::default();
        assert!(lines.push(&[b'x'; LONGEST_LINE]).is_some());
        assert!(lines.push(b"x").is_none());
    }

    #[tokio::test]
    async fn an_agent_that_is_not_there_is_named_with_what_to_do() {
        let client = Client { target: Target::Unix("/nonexistent/agent.sock".into()) };
        let error = client.get::<()>("/api/v1/cluster").await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/agent.sock") && error.contains("systemctl status holdfast"), "{error}");
    }
}
