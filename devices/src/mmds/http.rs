//! The HTTP of the service: a request's head in, an answer out, and the connection is closed after it.

use httparse::{EMPTY_HEADER, Status};

/// Most bytes of a request's head.
pub const HEAD_MAX: usize = 4096;
/// What the life of a token is called here, and by EC2.
const TTL: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];
/// Most header fields of a request.
const FIELDS_MAX: usize = 64;

/// What the bytes of a connection are so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// The beginning of a request.
    Part,
    /// A whole head.
    Request(Request),
    /// No request.
    Nonsense,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A part of the metadata.
    Get,
    /// A token.
    Put,
    /// What the service does not do.
    Other,
}

/// As far as the service looks at it. Of header fields that are given twice, the first counts.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub method: Method,
    /// The path, without blanks or a query: it begins with '/'.
    pub path: String,
    /// `Accept`.
    pub accept: Option<String>,
    /// `X-metadata-token`, or what EC2 calls it.
    pub token: Option<String>,
    /// `X-metadata-token-ttl-seconds`, or what EC2 calls it, with the name that was used.
    pub ttl: Option<(&'static str, String)>,
    /// Whether it has come through a proxy that says so (`X-Forwarded-For`).
    pub is_forwarded: bool,
}

/// Reads what was received.
pub fn read(bytes: &[u8]) -> Received {
    let mut fields = [EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(Status::Complete(_)) => {}
        Ok(Status::Partial) if bytes.len() < HEAD_MAX => return Received::Part,
        Ok(Status::Partial) | Err(_) => return Received::Nonsense,
    }
    let (Some(method), Some(path)) = (request.method, request.path.and_then(path_of)) else {
        return Received::Nonsense;
    };
    let field = |name: &str| {
        let mut fields = request.headers.iter();
        let field = fields.find(|field| field.name.eq_ignore_ascii_case(name))?;
        Some(String::from_utf8_lossy(field.value).trim().to_owned())
    };
    Received::Request(Request {
        method: match method {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            _ => Method::Other,
        },
        path,
        accept: field("accept"),
        token: field("x-metadata-token").or_else(|| field("x-aws-ec2-metadata-token")),
        ttl: TTL.iter().find_map(|&name| Some((name, field(name)?))),
        is_forwarded: field("x-forwarded-for").is_some(),
    })
}

/// The path of a request's target, which may have a host before it (RFC 9112 §3.2) and a query behind it.
fn path_of(target: &str) -> Option<String> {
    let path = match target.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |start| &rest[start..]),
        None => target,
    };
    let path = path.split('?').next()?;
    path.starts_with('/').then(|| path.to_owned())
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Code and reason.
    pub status: &'static str,
    /// Of the body.
    pub content_type: &'static str,
    /// A header field more, such as `Allow`.
    pub field: Option<(&'static str, String)>,
    /// What is told.
    pub body: String,
}

impl Answer {
    /// An answer of plain text.
    pub fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self {
            status,
            content_type: "text/plain",
            field: None,
            body: body.into(),
        }
    }

    /// As it goes over the wire.
    pub fn into_bytes(self) -> Vec<u8> {
        let field = self.field.map(|(name, value)| format!("{name}: {value}\r\n"));
        let head = format!(
            "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n{}Connection: close\r\n\r\n",
            self.status,
            self.content_type,
            self.body.len(),
            field.unwrap_or_default()
        );
        [head, self.body].concat().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request {
        match read(text.as_bytes()) {
            Received::Request(request) => request,
            other => panic!("{text:?} is {other:?}"),
        }
    }

    #[test]
    fn the_fields_that_matter_are_read_under_either_name_in_any_case() {
        let asked = request(
            "PUT /latest/api/token HTTP/1.1\r\nHost: h\r\nX-Metadata-Token-TTL-Seconds: 60\r\nx-forwarded-for: me\r\n\r\nbody",
        );
        assert_eq!((asked.method, asked.path.as_str()), (Method::Put, "/latest/api/token"));
        assert_eq!((asked.ttl, asked.is_forwarded), (Some((TTL[0], "60".to_owned())), true));
        let asked = request(
            "GET /a?b HTTP/1.0\r\nX-aws-ec2-metadata-token:  t \r\nX-aws-ec2-metadata-token-ttl-seconds: 1\r\n\
             Accept: application/json\r\n\r\n",
        );
        assert_eq!((asked.method, asked.path.as_str()), (Method::Get, "/a"));
        assert_eq!(
            (asked.token.as_deref(), asked.ttl),
            (Some("t"), Some((TTL[1], "1".to_owned())))
        );
        assert_eq!(asked.accept.as_deref(), Some("application/json"));
        assert_eq!(request("DELETE http://169.254.169.254 HTTP/1.1\r\n\r\n").path, "/");
        assert_eq!(request("GET http://h/x/y HTTP/1.1\r\n\r\n").path, "/x/y");
    }

    #[test]
    fn a_request_is_whole_or_not_yet_or_none() {
        let whole = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        for len in 0..whole.len() {
            assert_eq!(read(&whole.as_bytes()[..len]), Received::Part, "{len}");
        }
        let endless = format!("GET /{} ", "a".repeat(HEAD_MAX));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(FIELDS_MAX + 1));
        for nonsense in ["\0", "GET * HTTP/1.1\r\n\r\n", "GET / HTTP/9\r\n\r\n", &endless, &many] {
            assert_eq!(read(nonsense.as_bytes()), Received::Nonsense, "{nonsense:?}");
        }
    }

    #[test]
    fn an_answer_says_how_long_it_is_and_that_it_is_the_last() {
        let answer = Answer {
            field: Some(("Allow", "GET".to_owned())),
            ..Answer::text("200 OK", "ä")
        };
        assert_eq!(
            String::from_utf8(answer.into_bytes()).unwrap(),
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\nAllow: GET\r\nConnection: close\r\n\r\nä"
        );
    }
}
