# One static binary in an image that holds nothing else. Build with
#   docker build --build-arg VERSION=v1.2.3 --build-arg GIT_SHA=$(git rev-parse --short HEAD) -t quire .
# and run with
#   docker run -p 2379:2379 -v quire-data:/var/lib/quire quire
FROM golang:1.26 AS build
WORKDIR /src
# Modules first: this layer survives every change that is not one of dependencies.
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION
ARG GIT_SHA
ARG TARGETOS
ARG TARGETARCH
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -buildvcs=false \
      -ldflags "-s -w -X main.version=$VERSION -X main.gitSHA=$GIT_SHA" -o /out/quire ./cmd/quire
# A volume takes owner and mode from the image; scratch has no mkdir to make it there.
RUN mkdir -p -m 0700 /out/data

FROM scratch
# Only for a --client-cert-auth without --trusted-ca-file, which means the system's CAs.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /out/quire /usr/local/bin/quire
COPY --from=build --chown=65532:65532 /out/data /var/lib/quire
USER 65532:65532
WORKDIR /var/lib/quire
VOLUME /var/lib/quire
# Variables, not arguments: "docker run quire --name a" adds flags without losing these.
ENV ETCD_DATA_DIR=/var/lib/quire ETCD_LISTEN_CLIENT_URLS=http://0.0.0.0:2379 ETCD_ADVERTISE_CLIENT_URLS=http://localhost:2379
EXPOSE 2379
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/quire"]
